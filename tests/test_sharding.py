"""sharding.py: the layers' weights in shards on two and four gloo ranks give what they give whole, in less memory."""
import math
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_common import flip, no_file_larger_than, start_ranks
from test_memory import track_a, track_b
from torch import nn
from torch.distributed.tensor import DTensor

import common
from common import all_sum, corruption_of, load_checkpoint, rank_of, reduce_gradients
from decoders import checkpoint_layers
from sharding import TensorReader, join_shards, places_of, save_with_shards, shard_layers, step_together
from tools.memory import memory_needed
from training import clip_gradients, grad_norms, names_with_gradient, parameter_groups

CPU = torch.device('cpu')
MAKERS = {
    'a1': partial(track_a, lora_dropout=None), 'a2': partial(track_a, lora_dropout=0.0), 'b3': track_b,
    'b4': partial(track_b, has_lora=True), 'b4-full_tune': partial(track_b, full_tune=True)}


def results_on(n, function, *args):
    """[what function(*args) returns on each of n gloo processes]."""
    ranks = start_ranks(lambda rank: pickle.dumps(function(*args)), n=n)   # a tensor would not outlive its process
    return [pickle.loads(hear.recv()) for _, hear in ranks]


def make(kind, half=False):
    """(model, batch) without dropout, the same on every rank."""
    torch.manual_seed(0)
    model, batch, _, _ = MAKERS[kind](half=half)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, batch


def trainable_of(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def step(model, batch, n_passes):
    """A step of which this rank makes so many passes: (loss over all ranks, gradients by name, whole)."""
    trainable = trainable_of(model)
    total = 0.0
    for again in step_together(model.llm, n_passes * [batch]):
        loss = model(again)
        loss.backward()
        total += loss.item()
    reduce_gradients(trainable.values())
    gradients = {}
    for name, p in trainable.items():
        if p.grad is not None:
            gradients[name] = (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).clone()
    return all_sum(total), gradients


def bytes_held(model):
    held = 0
    for p in model.parameters():
        part = p.to_local() if isinstance(p, DTensor) else p
        held += part.untyped_storage().nbytes()
    return held


def sharded_and_whole(kind, half, checkpointing):
    """What a rank that shares the layers and one that does not find in a step of unlike many passes on each rank."""
    n_passes = [2, 0, 1, 1][rank_of()[0]]
    whole, batch = make(kind, half)
    found = {'whole': step(whole, batch, n_passes), 'whole_bytes': bytes_held(whole)}
    model, batch = make(kind, half)
    if checkpointing:
        checkpoint_layers(model.llm)
    shard_layers(model.llm, CPU)
    model.train()
    found['bytes'] = bytes_held(model)
    found['shards'] = step(model, batch, n_passes)
    found['norm'] = grad_norms(trainable_of(model), {'all': ''})['all']
    found['named'] = names_with_gradient(trainable_of(model), set())
    clip_gradients(trainable_of(model), found['norm'], found['norm'] / 2)
    found['clipped'] = grad_norms(trainable_of(model), {'all': ''})['all']
    return found


@pytest.mark.parametrize('kind', MAKERS)
@pytest.mark.parametrize('n_ranks, half, checkpointing', [(2, False, False), (2, True, True), (4, False, True)])
def test_shards_give_the_gradients_of_whole_weights_with_unlike_many_passes(kind, n_ranks, half, checkpointing):
    """To the bit on two ranks, where a sum has one order. Ranks without a batch take part all the same."""
    for found in results_on(n_ranks, sharded_and_whole, kind, half, checkpointing):
        loss, gradients = found['shards']
        wanted_loss, wanted = found['whole']
        assert loss == wanted_loss and gradients.keys() == wanted.keys() and wanted
        for name in wanted:
            if n_ranks == 2:
                assert torch.equal(gradients[name], wanted[name]), name
            else:
                torch.testing.assert_close(gradients[name], wanted[name], rtol=1e-4, atol=1e-4)
        square = sum(gradient.double().square().sum().item() for gradient in wanted.values())
        assert found['norm'] == pytest.approx(math.sqrt(square), rel=1e-5)
        assert found['clipped'] == pytest.approx(found['norm'] / 2, rel=1e-5)
        assert found['named'] == {name for name, gradient in wanted.items() if gradient.any()}


@pytest.mark.parametrize('n_ranks', [2, 4])
def test_a_rank_holds_its_part_of_the_layers_and_no_more(n_ranks):
    matrices = 4 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 192)    # q, k, v, o and the MLP of four layers
    for kind in 'b3', 'b4', 'b4-full_tune':
        model, _, step, trained = MAKERS[kind](half=False)
        step = replace(step, ranks=n_ranks, shard=True)
        need = memory_needed(kind[:2], model.llm.config, None, step, trained)
        for found in results_on(n_ranks, sharded_and_whole, kind, False, False):
            assert found['whole_bytes'] - found['bytes'] == 4 * matrices * (n_ranks - 1) // n_ranks
            assert found['bytes'] == need['frozen'] + need['trained']


def losses_in_eval_mode():
    """Losses of rank + 1 batches, which no other rank waits for, then of a step in shards again."""
    model, batch = make('b4-full_tune')
    shard_layers(model.llm, CPU)
    model.eval()
    model.eval()                                       # at once: no other rank is asked
    with torch.no_grad():
        losses = [model(batch).item() for _ in range(rank_of()[0] + 1)]
    weight = model.llm.model.layers[0].mlp.up_proj.weight
    was_whole = not isinstance(weight, DTensor)
    model.train()
    losses += [step(model, batch, 1)[0] / 2]
    return losses, was_whole, isinstance(model.llm.model.layers[0].mlp.up_proj.weight, DTensor)


def test_in_eval_mode_each_rank_goes_its_own_way():
    model, batch = make('b4-full_tune')
    wanted = model(batch).item()
    for rank, (losses, was_whole, is_sharded) in enumerate(results_on(2, losses_in_eval_mode)):
        assert losses == [wanted] * (rank + 2) and was_whole and is_sharded


# -----------------------------------------------------------------------------
# checkpoints


def with_optimizer():
    """(model, its batch, its optimizer), in shards where there are several ranks."""
    model, batch = make('b4-full_tune')
    shard_layers(model.llm, CPU)
    groups = parameter_groups(trainable_of(model), {'new_': 1.0, 'llm.': 1.0}, 0.0)
    return model, batch, torch.optim.AdamW(groups, lr=1e-2, fused=True)


def state_of(model, optimizer):
    return {'tuned': {name: p.detach() for name, p in trainable_of(model).items()}, 'optimizer': optimizer.state_dict()}


def whole(value):
    """The same with whole tensors."""
    if isinstance(value, dict):
        return {key: whole(part) for key, part in value.items()}
    return value.full_tensor().clone() if isinstance(value, DTensor) else value


def save_a_step(folder):
    model, batch, optimizer = with_optimizer()
    step(model, batch, 1)
    optimizer.step()
    save_with_shards(folder, state_of(model, optimizer), {'step': 1})
    return whole(state_of(model, optimizer))


def load_a_step(folder):
    model, _, optimizer = with_optimizer()
    tensors, meta, used = load_checkpoint(folder)
    tensors = join_shards(tensors, used, places_of(state_of(model, optimizer)['tuned'], optimizer))
    optimizer.load_state_dict(tensors['optimizer'])
    with torch.no_grad():
        for name, p in trainable_of(model).items():
            p.copy_(tensors['tuned'][name])
    state = state_of(model, optimizer)
    for n, p in enumerate(p for group in optimizer.param_groups for p in group['params']):
        assert type(state['optimizer']['state'][n]['exp_avg']) is type(p.detach())     # in shards where p is
    return whole(state)


def assert_equal(found, wanted):
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_equal(found[key], wanted[key])
    elif isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted)
    else:
        assert found == wanted


@pytest.mark.parametrize('n_saved, n_loaded', [(2, 1), (1, 2), (2, 4), (4, 2)])
def test_what_some_ranks_have_saved_any_number_reads(n_saved, n_loaded, tmp_path):
    run = [save_a_step(tmp_path / 'ckpt')] if n_saved == 1 else results_on(n_saved, save_a_step, tmp_path / 'ckpt')
    assert len(list(tmp_path.glob('ckpt/shards/*.distcp'))) == (0 if n_saved == 1 else n_saved)
    found = [load_a_step(tmp_path / 'ckpt')] if n_loaded == 1 else results_on(n_loaded, load_a_step, tmp_path / 'ckpt')
    for state in found:
        assert_equal(state, run[0])


def test_a_shard_that_is_damaged_or_gone_is_noticed_and_one_process_reads_a_part(tmp_path):
    [wanted, _] = results_on(2, save_a_step, tmp_path / 'ckpt')
    tensors, _, used = load_checkpoint(tmp_path / 'ckpt')
    only = join_shards(tensors, used, only='tuned/')
    assert_equal(only['tuned'], wanted['tuned'])
    assert 'exp_avg' not in only['optimizer']['state'].get(2, {})
    shard = used / 'shards' / '__1_0.distcp'
    flip(shard)
    assert corruption_of(used) == 'sha256 of shards/__1_0.distcp differs from the manifest'
    shard.unlink()
    assert 'No such file' in corruption_of(used)


class Code:
    def __reduce__(self):
        return print, ('it runs',)


def test_no_code_runs_in_a_table_of_contents(tmp_path):
    (tmp_path / '.metadata').write_bytes(pickle.dumps(Code()))
    with pytest.raises(ValueError, match='builtins.print in its table of contents describes no tensor'):
        TensorReader(tmp_path).read_metadata()


def save_on_a_full_disk(folder, n_bytes):
    model, batch, optimizer = with_optimizer()
    step(model, batch, 1)
    optimizer.step()
    with no_file_larger_than(n_bytes):
        try:
            save_with_shards(folder, state_of(model, optimizer), {'step': 1})
        except SystemExit as e:
            return str(e)


@pytest.mark.parametrize('n_bytes', [10_000, 1_000_000])   # what is whole does not fit, or only the shards do not
def test_a_full_disk_ends_every_rank_with_a_line(tmp_path, n_bytes):
    first, second = results_on(2, save_on_a_full_disk, tmp_path / 'ckpt', n_bytes)
    assert 'cannot write this checkpoint' in first and 'there is none before it' in first
    assert ('another rank has ended' if n_bytes == 10_000 else 'cannot write the shards of rank 1') in second
    assert '\n' not in first + second and not list(tmp_path.glob('*'))


def load_and_count(folder):
    looked = []
    whole = common.sha256_file
    common.sha256_file = lambda path: looked.append(path) or whole(path)
    return load_checkpoint(folder)[2].name, len(looked)


def test_one_rank_looks_for_damage_and_all_take_the_same_checkpoint(tmp_path):
    for _ in range(2):
        results_on(2, save_a_step, tmp_path / 'ckpt')
    (tmp_path / 'ckpt' / 'shards' / '__1_0.distcp').unlink()
    (folder, n_looked), other = results_on(2, load_and_count, tmp_path / 'ckpt')
    assert folder == 'ckpt.prev' and n_looked > 5 and other == ('ckpt.prev', 0)
