"""tools/memory.py: what stays is counted exactly, what is kept for the backward pass is what autograd keeps."""
import re
import runpy
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPO
from test_docs import settings_of
from test_real_configs import QWEN3, SO400M, settings_for
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from configure import configure
from data import collate
from examples import NO_IMAGES, Example
from lists import Item
from decoders import LOGITS_AT_ONCE, checkpoint_layers, lora
from model import VLM, Connector, Tower
from token_model import TokenModel
from tools import eval_cost
from tools.memory import (
    LARGE, LORA_64, PLAN, SMALL, Step, Trained, a1_step, a2_step, b_step, gib, known_config, memory_needed, table)
from uti import TokenSpace

# -----------------------------------------------------------------------------
# what stays


@pytest.mark.parametrize('size', QWEN3)
def test_what_stays_is_counted_exactly_on_the_real_shapes(size):
    """Frozen weights 2 bytes, learned ones 4 each for the master, the gradient and the two moments of AdamW."""
    shape, n_llm, n_connector = QWEN3[size]
    llm = Qwen3Config(**shape)
    tower = SiglipVisionConfig(**SO400M)
    with torch.device('meta'):
        n_tower = sum(p.numel() for p in Tower(SiglipVisionModel(tower)).parameters())
    n_layers = shape['num_hidden_layers']
    d = shape['hidden_size']
    i = shape['intermediate_size']
    q = shape['num_attention_heads'] * 128
    kv = shape['num_key_value_heads'] * 128
    n_lora = n_layers * ((d + q) + 2 * (d + kv) + (q + d) + 3 * (d + i))          # for each unit of its rank
    n_tuned = n_layers * (2 * d * q + 2 * d * kv + 3 * d * i + 2 * d + 2 * 128) + d   # and the last norm
    n_rows = 2 * 18_436 * d
    for stage, trained, frozen, learned in (
            ('a1', Trained(), n_llm + n_tower, n_connector),
            ('a2', Trained(lora_r=16), n_llm + n_tower, n_connector + 16 * n_lora),
            ('b3', Trained(new_rows=18_436), n_llm, n_rows),
            ('b4', Trained(new_rows=18_436, lora_r=64), n_llm, n_rows + 64 * n_lora),
            ('b4', Trained(new_rows=18_436, full_tune=True), n_llm - n_tuned, n_rows + n_tuned)):
        need = memory_needed(stage, llm, tower, Step(), trained)
        stays = [need[part] for part in ('frozen', 'trained', 'gradients', 'optimizer')]
        assert stays == [2 * frozen, 4 * learned, 4 * learned, 8 * learned], stage


# -----------------------------------------------------------------------------
# what is kept for the backward pass

TOWER = SiglipVisionConfig(hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                           image_size=40, patch_size=8)
SPACE = TokenSpace({'name': '', 'text_rows': 1000, 'tokenizer_sha256': '', 'end_of_text': 2},
                   {'size': 8, 'grid': [4, 8], 'codes': 300})
SIX = Step(micro_batch_size=6, example_tokens=60, cuda=False)
LABEL_POSITIONS = np.arange(20, 60, dtype=np.int32)    # 40 of the 60 tokens


def tiny_llm(half):
    torch.manual_seed(0)
    llm = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=1000, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16)).to(torch.bfloat16 if half else torch.float32)
    llm.set_attn_implementation('unpadded')
    return llm.requires_grad_(False)


def add_lora(llm, dropout):
    lora(llm, r=4, alpha=8, dropout=dropout, targets='')


def track_a(half, lora_dropout=None):
    """(model, batch, Step, Trained) of six examples of 60 tokens, 8 of them an image, 40 labels; LoRA unless None."""
    vlm = VLM(None, Connector(48, 5, 64, num_image_tokens=8, width=32, depth=2, heads=4), tiny_llm(half))
    if lora_dropout is not None:
        add_lora(vlm.llm, lora_dropout)
    ids = np.full(60, 5, np.int32)
    starts = np.array([1])
    examples = [Example(Item(str(n), ('x',), ()), ids, LABEL_POSITIONS, starts, False) for n in range(6)]
    batch = collate(examples, [[np.zeros((25, 48), np.float32)]] * 6, 8)
    connector = {'num_image_tokens': 8, 'width': 32, 'depth': 2, 'heads': 4}
    trained = Trained(connector, lora_r=4, lora_dropout=lora_dropout or 0.0)
    return vlm.train(), batch, replace(SIX, labels=40, half=half), trained


def track_b(half, full_tune=False, has_lora=False):
    """The same of six examples of 60 tokens: 8 labels of text, 32 codes."""
    model = TokenModel(tiny_llm(half), SPACE)
    if full_tune:
        for part in model.llm.model.layers, model.llm.model.norm:
            part.float().requires_grad_(True)
    if has_lora:
        add_lora(model.llm, 0.1)
    ids = np.repeat([5, 1010], [28, 32]).astype(np.int32)
    ranges = np.repeat([0, 2], [8, 32]).astype(np.int16)
    examples = [Example(SimpleNamespace(id=str(n)), ids, LABEL_POSITIONS, NO_IMAGES, False, ranges) for n in range(6)]
    step = replace(SIX, labels=8, codes=32, code_range=300, half=half)
    trained = Trained(new_rows=304, lora_r=4, lora_dropout=0.1, full_tune=full_tune)
    return model.train(), collate(examples), step, trained


@pytest.fixture
def fused_attention(monkeypatch):
    """As it is on a GPU: in bf16 a CPU goes by the definition, which keeps every score."""
    def fused(q, k, v, scaling=None, dropout=0.0, softcap=None, mask=None):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout,
                                              enable_gqa=True)
    monkeypatch.setattr('decoders.short_attention', fused)


def kept(model, batch):
    """(bytes that autograd keeps of a forward pass, each storage once, without the model's own weights; the loss)."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tensors = {}                                       # kept alive, so that no address comes again

    def pack(tensor):
        tensors[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(batch)
    return sum(t.untyped_storage().nbytes() for address, t in tensors.items() if address not in own), loss


class Alive(TorchDispatchMode):
    """Bytes of the storages that were made inside and are alive: now, and the most at any time."""
    def __init__(self, model):
        super().__init__()
        # {what a storage is known by: its weak reference}; the model's own come out of views
        self.known = {p.untyped_storage()._cdata: None for p in [*model.parameters(), *model.buffers()]}
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return made

    def count(self, storage):
        size = storage.nbytes()
        key = storage._cdata
        if key in self.known:
            return

        def free(_):
            del self.known[key]
            self.now -= size

        self.known[key] = weakref.ref(storage, free)
        self.now += size
        self.most = max(self.most, self.now)


def step_alive(model, batch):
    """(loss, gradients by name, bytes alive after the forward pass, the most of the whole step) of a seeded step."""
    torch.manual_seed(7)
    with Alive(model) as alive:
        loss = model(batch)
        after_forward = alive.now
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients, after_forward, alive.most


CHECKPOINTED = [('a1', track_a, {}), ('a2', track_a, {'lora_dropout': 0.1}), ('b3', track_b, {}),
                ('b4', track_b, {'has_lora': True}), ('b4', track_b, {'full_tune': True})]


@pytest.mark.parametrize('half', [False, True], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('stage, make, options', CHECKPOINTED, ids=['a1', 'a2', 'b3', 'b4', 'b4-full_tune'])
def test_checkpointing_gives_the_same_step_to_the_bit_in_less_memory(stage, make, options, half, fused_attention):
    model, batch, step, trained = make(half, **options)
    loss, gradients, _, most = step_alive(model, batch)
    checkpoint_layers(model.llm)
    loss_again, gradients_again, after_forward, most_again = step_alive(model, batch)
    assert torch.equal(loss, loss_again) and gradients.keys() == gradients_again.keys() and gradients
    for name in gradients:
        assert torch.equal(gradients[name], gradients_again[name]), name
    need = memory_needed(stage, model.llm.config, TOWER, replace(step, checkpointing=True), trained)
    ratio = (need['activations'] + need['logits']) / after_forward
    print(f'{stage} {half}: {after_forward} bytes alive, {ratio:.3f} times that by the formula; {most_again} of {most}')
    assert 1 / 1.15 < ratio < 1.15 and most_again < 0.7 * most


def test_what_is_computed_again_is_not_computed_twice_without_gradients():
    model, batch, _, _ = track_b(half=False)
    checkpoint_layers(model.llm)
    with torch.no_grad():
        assert model(batch).grad_fn is None


def n_bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize('half', [False, True], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('stage, make, options', [
    ('a1', track_a, {}), ('a2', track_a, {'lora_dropout': 0.0}), ('a2', track_a, {'lora_dropout': 0.1}),
    ('b3', track_b, {}), ('b4', track_b, {'has_lora': True}), ('b4', track_b, {'full_tune': True})],
    ids=['a1', 'a2', 'a2-dropout', 'b3', 'b4', 'b4-full_tune'])
def test_what_the_formula_says_is_kept_is_what_autograd_keeps(stage, make, options, half, fused_attention):
    """Within a factor of 1.15 either way; and gradients and optimizer state to the byte."""
    model, batch, step, trained = make(half, **options)
    need = memory_needed(stage, model.llm.config, TOWER, step, trained)
    found, loss = kept(model, batch)
    ratio = (need['activations'] + need['logits']) / found
    print(f'{stage} {half}: {found} bytes kept, the formula says {ratio:.3f} times that')
    assert 1 / 1.15 < ratio < 1.15
    loss.backward()
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned)
    optimizer.step()
    assert n_bytes(p.grad for p in learned if p.grad is not None) == need['gradients']
    for moment in 'exp_avg', 'exp_avg_sq':
        assert n_bytes(state[moment] for state in optimizer.state.values()) == need['optimizer'] / 2
    frozen = n_bytes(p for p in model.parameters() if not p.requires_grad)
    if stage in ('a1', 'a2'):                          # these models have their features given, and no tower
        assert need['frozen'] > frozen
    else:
        assert need['frozen'] == frozen


def test_a_formula_that_forgot_the_mlp_would_be_noticed(fused_attention):
    model, batch, step, trained = track_a(half=True)
    found, _ = kept(model, batch)
    model.llm.config.intermediate_size = 64            # instead of 192
    need = memory_needed('a1', model.llm.config, TOWER, step, trained)
    assert (need['activations'] + need['logits']) / found < 1 / 1.15


def test_what_does_not_grow_does_not_and_what_does_does():
    llm = Qwen3Config(**QWEN3['0.6b'][0])
    tower = SiglipVisionConfig(**SO400M)
    one, two = (memory_needed('a2', llm, tower, Step(n, example_tokens=100, labels=400), Trained()) for n in (8, 16))
    assert two['logits'] == one['logits'] == 4 * (LOGITS_AT_ONCE // 151_936) * 151_936   # however many the labels
    assert 1.9 < two['activations'] / one['activations'] < 2.1 and two['optimizer'] == one['optimizer']
    full_tune = Trained(new_rows=32_772, full_tune=True)
    alone, eight = (memory_needed('b4', llm, None, Step(1, example_tokens=8, ranks=n), full_tune) for n in (1, 8))
    assert eight['peak'] > alone['peak']               # the ranks' message: the gradients once more
    need = memory_needed('a1', llm, tower, Step(1), Trained())
    assert need['peak'] >= sum(size for part, size in need.items() if part != 'peak')


# -----------------------------------------------------------------------------
# the page


@pytest.fixture(scope='module')
def plan():
    return table()


def test_the_table_of_the_page_is_what_the_function_gives(plan):
    assert plan in (REPO / 'docs' / 'bigger.md').read_text()


@pytest.mark.parametrize('size, base, ranks', [('0.6b', SMALL, 1), ('8b', LARGE, 8)])
@pytest.mark.parametrize('stage, step', [('a1', a1_step), ('a2', a2_step), ('b3', b_step), ('b4', b_step)])
def test_the_head_of_a_real_config_says_what_the_function_gives(stage, step, size, base, ranks):
    head = (REPO / f'configs/{stage}_qwen3_{size}.py').read_text()
    settings = settings_for(stage, size)
    llm = known_config(f'Qwen/{base}', Qwen3Config)
    tower = known_config(settings_for('a1', size)['vision'], SiglipVisionConfig)
    trained = LORA_64 if stage[0] == 'b' else Trained()
    assert settings.get('lora_r', trained.lora_r) == trained.lora_r
    said = [(settings['micro_batch_size'], re.search(r'Costs ([\d.]+) GiB of GPU memory by formula', head)[1])]
    said += [(int(n), peak) for n, peak in re.findall(r'micro_batch_size = (\d+) takes ([\d.]+\d)', head)]
    for n, peak in said:
        need = memory_needed(stage, llm, tower, step(n, ranks=ranks), trained)
        assert gib(need['peak']) == peak
        for frozen in re.findall(r'([\d.]+) of them frozen', head):
            assert gib(need['frozen']) == frozen


def test_every_command_of_the_page_takes_a_batch_that_the_table_says_fits(plan):
    largest = {}                                       # {(stage, base, its settings, GiB of a GPU): micro_batch_size}
    for line, (gpu, stage, base, step, trained) in zip(plan.splitlines()[2:], PLAN):
        if line.endswith('| fits |'):
            key = stage[:2], base, trained.full_tune, step.shard, step.checkpointing, gpu.split()[-2]
            largest[key] = max(step.micro_batch_size, largest.get(key, 0))
    page = (REPO / 'docs' / 'bigger.md').read_text()
    n_commands = 0
    for part, gpu in ('One card', '24'), ('One H200', '139'), ('Eight', '139'), ('Several', '139'):
        section = page[page.index(f'## {part}'):].split('\n## ')[0]
        for stage, size, more in re.findall(r'train_\w\d\.py configs/(\w\d)_qwen3_([\d.]+b)\.py(.*)', section):
            config = str(REPO / f'configs/{stage}_qwen3_{size}.py')
            settings = configure(settings_of(f'train_{stage}.py'), [config, *more.split()])
            chosen = [name in more for name in ('full_tune', 'shard', 'gradient_checkpointing')]
            key = stage, f'Qwen3-{size.upper()}', *chosen, gpu
            assert settings['micro_batch_size'] <= largest[key], (part, stage, size)
            n_commands += 1
    assert n_commands == 16


def test_the_table_of_evaluations_is_what_the_tool_gives():
    assert eval_cost.table(tflops=400.0, tb_per_s=3.0, cards=(1, 8)) in (REPO / 'docs' / 'bigger.md').read_text()


def test_what_an_example_and_a_new_token_cost_by_hand():
    shape = {'hidden_size': 10, 'num_attention_heads': 2, 'head_dim': 4, 'num_key_value_heads': 1,
             'intermediate_size': 30, 'num_hidden_layers': 3, 'vocab_size': 100}
    card = eval_cost.Card(shape, flops=1e3, bandwidth=1e9)
    weights = 3 * (2 * 10 * 8 + 2 * 10 * 4 + 3 * 10 * 30)
    assert card.forward(eval_cost.Example(7, 2)) == 2 * (7 * weights + 2 * 10 * 100) / 1e3
    # five continuations of one token, two at a time: three passes, each bound by its products
    products = 2 * 5 * weights * 4 + 2 * 5 * (weights + 10 * 100)
    assert card.generate(5, 4, 1, head=100, batch=2) == pytest.approx(products / 1e3)
    # and by what it reads, where the card multiplies fast: weights in two bytes, keys and values of 4.5 tokens
    card = eval_cost.Card(shape, flops=1e18, bandwidth=1e9)
    n_bytes = 3 * 2 * (weights + 10 * 100) + 5 * 4.5 * (2 * 2 * 3 * 1 * 4)
    assert card.generate(5, 4, 1, head=100, batch=2) == pytest.approx(n_bytes / 1e9)


def run_tool(monkeypatch, *args):
    """`python -m tools.memory` in this process."""
    monkeypatch.setattr(sys, 'argv', ['memory.py', *args])
    runpy.run_module('tools.memory', run_name='__main__')


@pytest.mark.filterwarnings('ignore:.*found in sys.modules')
def test_it_prints_its_parts_and_refuses_what_is_no_stage_or_no_model(tiny, monkeypatch, capsys):
    run_tool(monkeypatch, f'--llm={tiny}/llm', f'--vision={tiny}/vision', '--micro_batch_size=2')
    assert capsys.readouterr().out.splitlines()[-1].startswith('peak')
    for change, found in (('--stage=a3', "stage = 'a3'"), ('--full_tune=True', 'only b4 has it'),
                          ('--llm=/no/where', '/no/where: no Hugging Face model here'),
                          (f'--llm={tiny}/vision', 'wanted that of a language model')):
        with pytest.raises(SystemExit, match=found):
            run_tool(monkeypatch, change)
