"""token_model.py: new rows, the typed head, ablations, sampling under the grammar, completions, the export."""
import hashlib
import io
import json
import pickle
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from PIL import Image
from test_common import no_file_larger_than
from test_model import assert_one_line, change_json
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from common import whole_folder
from data import collate
from examples import NO_IMAGES, Example
from gates import curves
from media import contact_sheet, write_picture, write_sound
from decoders import load_llm, save_pretrained
from shards import Record, prompt_of, token_example, with_prompt
from token_model import (
    TokenModel, complete_task, crossed_losses, derangement, example_sums, export_difference, export_stock,
    load_new_rows, random_media, read_text, save_new_rows, shuffled_media, shuffled_prompts, text_difference,
    training_bytes, write_codes, write_completions)
from uti import Grammar, TokenSpace, save_pictures, save_sounds

N_TEXT = 512                                           # rows of the tiny world's language model
END = 2                                                # its <|im_end|>
BASE = {'name': 'tiny', 'text_rows': N_TEXT, 'tokenizer_sha256': 'ab', 'end_of_text': END}
IMAGE = {'class': 'X', 'settings': {}, 'sha256': 'cd', 'size': 4, 'grid': (2, 2), 'codes': 16}
AUDIO = {'class': 'Y', 'settings': {}, 'sha256': 'ef', 'sample_rate': 8, 'samples': 8, 'frames': 2, 'codebooks': 2,
         'codes': 8}
SPACE = TokenSpace(BASE, IMAGE, AUDIO)                 # 512 text, 4 special, 16 image, 8 and 8 audio: 548 in all
GRAMMAR = Grammar(SPACE)


@pytest.fixture(scope='module', params=['tied', 'untied'])
def model(request, tiny, tmp_path_factory):
    """A TokenModel with large random weights: every id and every row moves the losses."""
    torch.manual_seed(0)
    config = Qwen3Config.from_pretrained(tiny / 'llm')
    config.tie_word_embeddings = request.param == 'tied'
    stock = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for p in stock.parameters():
            if p.ndim >= 2:
                p.normal_(std=0.3)
    folder = tmp_path_factory.mktemp(request.param)
    stock.save_pretrained(folder)
    return TokenModel(load_llm(folder), SPACE, noise=0.3)


def record(task, seed, n_text=5):
    modality = 'image' if 'i' in task else 'audio'
    rng = np.random.default_rng(seed)
    first, end = GRAMMAR.bounds(GRAMMAR.payload_ranges[modality])
    return Record(f'{task} {seed}', modality, payload=rng.integers(first, end).astype(np.int32),
                  text=rng.integers(3, 500, n_text).astype(np.int32), media_sha256=f'file {seed}', meta={})


def examples_of(*tasks):
    return [token_example(record(task, seed, 5 + seed), task, GRAMMAR, 64) for seed, task in enumerate(tasks)]


def text_example(ids):
    return Example(SimpleNamespace(id='text'), np.array(ids, np.int32), np.arange(1, len(ids)), NO_IMAGES, False)


SIX = 'i2t', 't2a', 'a2t', 't2i', 'i2t', 't2i'


def whole_matrices(model):
    """(V + new, D) embedding and head, leaves with a gradient."""
    embedding = torch.cat([model.llm.get_input_embeddings().weight, model.new_in])
    head = torch.cat([model.llm.get_output_embeddings().weight, model.new_out])
    return embedding.detach().requires_grad_(), head.detach().requires_grad_()


def losses_by_hand(model, example, embedding, head, typed):
    """[loss of each label] by whole matrices and a stock forward, the softmax over what is legal."""
    ids = torch.from_numpy(example.ids).long()
    hidden = model.llm.model(inputs_embeds=embedding[ids][None], use_cache=False).last_hidden_state[0]
    logits = hidden @ head.T                                                                    # (T, V + new)
    losses = []
    for position, index in zip(example.label_positions.tolist(), example.label_ranges.tolist()):
        legal = SPACE.ranges[index] if typed else SimpleNamespace(first=0, end=SPACE.total)
        losses.append(F.cross_entropy(logits[position - 1, legal.first:legal.end], ids[position] - legal.first))
    return losses


# -----------------------------------------------------------------------------
# losses and gradients

@pytest.mark.parametrize('typed', [True, False])
def test_losses_and_gradients_are_those_of_whole_matrices_and_reach_the_new_rows_only(model, typed, monkeypatch):
    monkeypatch.setattr(model, 'typed_head', typed)
    examples = examples_of(*SIX)
    batch = collate(examples)
    losses = model.nll(batch)
    losses.sum().backward()

    embedding, head = whole_matrices(model)
    by_example = [losses_by_hand(model, example, embedding, head, typed) for example in examples]
    sum(map(sum, by_example)).backward()
    order = np.argsort(np.concatenate([example.label_ranges for example in examples]), kind='stable')
    want = torch.stack(sum(by_example, []))[order]     # labels stand sorted by range
    assert torch.allclose(losses, want, rtol=2e-4, atol=1e-5)
    sums = torch.zeros(len(examples)).index_add(0, batch.label_examples, losses.detach())
    assert sums.tolist() == pytest.approx([sum(losses).item() for losses in by_example], rel=1e-4)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {'new_in', 'new_out'}
    for ours, whole in (model.new_in, embedding), (model.new_out, head):
        assert torch.allclose(ours.grad, whole.grad[N_TEXT:], rtol=1e-3, atol=1e-5 * whole.grad.abs().max())
    model.zero_grad()


def test_new_rows_start_around_the_mean_row_and_another_base_is_refused(model):
    torch.manual_seed(5)
    fresh = TokenModel(model.llm, SPACE, noise=0.02)
    assert fresh.new_in.shape == fresh.new_out.shape == (36, 32)
    assert fresh.new_in.dtype == torch.float32
    away = fresh.new_in.detach() - model.llm.get_input_embeddings().weight.mean(0)
    assert 0.015 < away.std() < 0.025
    assert not torch.equal(fresh.new_in, fresh.new_out)
    with pytest.raises(SystemExit, match='has 512 embedding rows, the token space counts 500 text rows'):
        TokenModel(model.llm, TokenSpace({**BASE, 'text_rows': 500}, IMAGE, AUDIO))


def test_examples_of_a_batch_do_not_see_each_other(model):
    one, two = examples_of(*SIX), examples_of(*SIX)
    two[1] = token_example(record('t2a', 99, n_text=12), 't2a', GRAMMAR, 64)
    before, after = example_sums(model, one, 6)[0], example_sums(model, two, 6)[0]
    others = [0, 2, 3, 4, 5]
    np.testing.assert_allclose(before[others], after[others], rtol=1e-5)
    assert abs(before[1] - after[1]) > 0.1
    np.testing.assert_allclose(before, example_sums(model, one, 1)[0], rtol=1e-5)


@pytest.mark.parametrize('task', ['i2t', 't2a'])
def test_crossed_losses_are_those_of_each_output_behind_each_input(model, task):
    examples = examples_of(*[task] * 5)
    crossed = crossed_losses(model, task, examples, [[4, 1, 2], [3, 0, 2]], batch_size=4)
    assert crossed.shape == (2, 3, 3)
    np.testing.assert_allclose(np.diagonal(crossed[0]), example_sums(model, examples, 4)[0][[4, 1, 2]], rtol=1e-5)
    given, said = examples[1].item, examples[4].item
    kept = {'payload': given.payload} if task == 'i2t' else {'text': given.text}
    mixed = token_example(replace(said, **kept), task, GRAMMAR, 64)
    assert crossed[0, 1, 0] == pytest.approx(example_sums(model, [mixed], 1)[0][0], rel=1e-5)


@torch.no_grad()
def test_sums_are_those_of_the_labels_and_more_than_half_of_the_probability_is_right(model):
    examples = examples_of(*SIX)
    losses, n_right = example_sums(model, examples, 4)
    by_example = [losses_by_hand(model, example, *whole_matrices(model), typed=True) for example in examples]
    assert losses.tolist() == pytest.approx([sum(each).item() for each in by_example], rel=1e-4)
    assert n_right.tolist() == [sum(loss.item() < np.log(2) for loss in each) for each in by_example]


def test_text_has_the_probabilities_of_the_base_to_the_last_bit_under_the_typed_head_alone(model, monkeypatch):
    examples = [text_example(np.random.default_rng(n).integers(0, N_TEXT, n)) for n in (2, 9, 40)]
    assert text_difference(model, examples) == 0
    unused = model.new_in.data[0].clone()
    model.new_in.data[0] = float('nan')
    assert text_difference(model, examples) == 0       # a row that no text uses cannot move text
    model.new_in.data[0] = unused
    monkeypatch.setattr(model, 'typed_head', False)
    assert text_difference(model, examples) > 0.01


def test_training_the_new_rows_takes_fewer_bytes_than_whole_matrices_by_their_rows(model):
    optimizer = torch.optim.AdamW([model.new_in, model.new_out], lr=0.0)
    model(collate(examples_of(*SIX))).backward()
    optimizer.step()
    model.zero_grad()
    n_matrices = 1 if model.llm.config.tie_word_embeddings else 2
    assert training_bytes(model, optimizer) == {
        'gradient': 36 * 32 * 4 * 2, 'optimizer': 36 * 32 * 4 * 2 * 2,
        'full_gradient': 548 * 32 * 4 * n_matrices, 'full_optimizer': 548 * 32 * 4 * n_matrices * 2}


# -----------------------------------------------------------------------------
# ablations

def test_a_derangement_gives_everyone_an_item_of_another_key_and_takes_each_once():
    keys = [b'a'] * 3 + [b'b'] * 2 + [b'c']            # half of them under one key: the most there may be
    partners = derangement(keys, seed=1)
    assert sorted(partners) == list(range(6))
    assert all(keys[i] != keys[k] for i, k in enumerate(partners))
    assert partners == derangement(keys, seed=1)
    assert len({tuple(derangement(keys, seed)) for seed in range(9)}) > 1


def test_shuffled_and_random_media_replace_the_codes_and_nothing_else():
    examples = examples_of('a2t', 'a2t', 'a2t')
    for changed in shuffled_media(examples, 4, seed=1), random_media(examples, GRAMMAR, 'audio', seed=1):
        for example, other in zip(examples, changed):
            GRAMMAR.check_payload('audio', other.ids[1:5])
            assert other.ids[1:5].tolist() != example.ids[1:5].tolist()
            assert other.ids[0] == example.ids[0]
            assert other.ids[5:].tolist() == example.ids[5:].tolist()


def test_shuffled_prompts_replace_the_words_and_never_by_the_same_words():
    examples = [with_prompt(token_example(record('t2i', n), 't2i', GRAMMAR, 64), [5 + min(n, 4)]) for n in range(8)]
    shuffled = shuffled_prompts(examples, seed=1)
    assert sorted(prompt_of(e)[0] for e in shuffled) == sorted(prompt_of(e)[0] for e in examples)
    for example, other in zip(examples, shuffled):
        assert prompt_of(example).tolist() != prompt_of(other).tolist()
        assert example.ids[example.label_positions].tolist() == other.ids[other.label_positions].tolist()


# -----------------------------------------------------------------------------
# sampling

PROMPTS = [[7, 8, 9], [11], [30, 31, 32, 33, 34, 35]]


@torch.no_grad()
def recomputed(model, task, prompt, guidance):
    """Greedy codes of one prompt, every step from nothing, with whole matrices."""
    embedding, head = whole_matrices(model)
    codes = []
    for index in GRAMMAR.expected(task)[:4].tolist():
        legal = SPACE.ranges[index]
        logits = []
        for text in prompt, []:
            ids = torch.tensor([*GRAMMAR.prompt(task, text=text).tolist(), *codes])
            hidden = model.llm.model(inputs_embeds=embedding[ids][None], use_cache=False).last_hidden_state[0, -1]
            logits.append((hidden @ head.T)[legal.first:legal.end])
        mixed = logits[1] + guidance * (logits[0] - logits[1])
        codes.append(legal.first + mixed.argmax().item())
    return codes


@pytest.mark.parametrize('task, guidance', [('t2i', 0.0), ('t2i', 1.0), ('t2i', 3.0), ('t2a', 3.0)])
def test_greedy_codes_are_those_of_a_full_recomputation(model, task, guidance):
    found = write_codes(model, GRAMMAR, task, PROMPTS, temperature=0.0, guidance=guidance)
    assert found.tolist() == [recomputed(model, task, prompt, guidance) for prompt in PROMPTS]


@pytest.mark.parametrize('sampling', [{}, {'temperature': 0.7, 'top_k': 5}, {'top_p': 0.8, 'guidance': 2.0}])
def test_codes_have_exact_length_legal_ids_and_do_not_depend_on_batch_mates(model, sampling):
    for task, modality in ('t2i', 'image'), ('t2a', 'audio'):
        together = write_codes(model, GRAMMAR, task, PROMPTS, seeds=[5, 6, 7], **sampling)
        for prompt, seed, codes in zip(PROMPTS, (5, 6, 7), together):
            GRAMMAR.check_payload(modality, codes)
            alone = write_codes(model, GRAMMAR, task, [prompt], seeds=[seed], **sampling)
            assert alone[0].tolist() == codes.tolist()
        others = write_codes(model, GRAMMAR, task, PROMPTS, seeds=[8, 9, 10], **sampling)
        assert together.tolist() != others.tolist()


def test_reading_cannot_leave_the_text_and_a_reading_task_writes_no_codes(model):
    model.new_out.data += 50                           # rows that would win every argmax
    payloads = [record('i2t', n).payload for n in range(3)]
    texts = read_text(model, GRAMMAR, 'i2t', payloads, max_new_tokens=8)
    model.new_out.data -= 50
    assert any(texts)
    assert all(0 <= id < N_TEXT and id != END for ids in texts for id in ids)
    assert texts[1] == read_text(model, GRAMMAR, 'i2t', payloads[1:2], max_new_tokens=8)[0]
    with pytest.raises(SystemExit, match="task 'i2t' writes no payload"):
        write_codes(model, GRAMMAR, 'i2t', PROMPTS)


# -----------------------------------------------------------------------------
# completions: what is written beside a checkpoint

class StubUTI:
    """Decodes codes into the gray, or the level, of the first one."""
    space = SPACE

    def decode_image(self, codes, metas):
        assert len(codes) == len(metas) <= 2
        return [np.full((3, 4, 4), row[0] % 256, np.uint8) for row in codes]

    def decode_audio(self, codes, metas):
        return [np.full(8, row[0] / 1000, np.float32) for row in codes]


@pytest.mark.parametrize('task, suffix', [('t2i', 'png'), ('t2a', 'wav'), ('i2t', '')])
def test_completions_are_the_same_for_any_batch_size_and_written_a_line_for_each_example(
        model, tiny, tmp_path, task, suffix):
    tokenizer = AutoTokenizer.from_pretrained(tiny / 'llm')
    examples = examples_of(task, task, task)
    settings = {'max_new_tokens': 6, 'temperature': 1.0, 'guidance': 2.0}
    outputs = complete_task(model, GRAMMAR, task, examples, 2, **settings)
    assert outputs == complete_task(model, GRAMMAR, task, examples, 3, **settings)
    decoded = write_completions(tmp_path / task, task, examples, outputs, tokenizer, StubUTI(), batch_size=2)

    lines = [json.loads(line) for line in (tmp_path / f'{task}.jsonl').read_text().splitlines()]
    key = 'prediction' if task == 'i2t' else 'codes'
    assert list(lines[1]) == ['id', 'media_sha256', 'truth', key]
    said = [tokenizer.decode(output, skip_special_tokens=True).strip() for output in outputs]
    assert [line[key] for line in lines] == (said if task == 'i2t' else outputs)
    assert lines[1]['truth'] == tokenizer.decode(examples[1].item.text)
    if task == 'i2t':
        assert decoded == [] and len(set(said)) > 1
        return
    alone = write_codes(model, GRAMMAR, task, [examples[2].item.text.tolist()], guidance=2.0, seeds=[2])
    assert outputs[2] == alone[0].tolist()             # example i draws with seed i
    files = sorted((tmp_path / task).iterdir())
    assert [file.name for file in files] == [f'{n:03d}.{suffix}' for n in range(3)]
    assert (tmp_path / f'{task}.png').exists() == (task == 't2i')
    if task == 't2i':
        assert np.asarray(Image.open(files[2])).tolist() == decoded[2].transpose(1, 2, 0).tolist()
    else:
        wave, rate = soundfile.read(files[2], dtype='float32')
        assert rate == 8
        np.testing.assert_allclose(wave, decoded[2], atol=1e-4)
    assert write_completions(tmp_path / 'no_codecs', task, examples, outputs, tokenizer) == []
    assert not (tmp_path / 'no_codecs').exists()


# -----------------------------------------------------------------------------
# what others load

def test_saved_rows_load_with_weights_only_and_come_back(model, tmp_path):
    save_new_rows(model, tmp_path, step=7)
    state = torch.load(tmp_path / 'trainable_rows.pt', weights_only=True)
    assert {name: tuple(rows.shape) for name, rows in state.items()} == {'new_in': (36, 32), 'new_out': (36, 32)}
    other = TokenModel(model.llm, SPACE)
    meta = load_new_rows(other, tmp_path)
    assert (meta['token_space'], meta['first_id'], meta['step']) == (SPACE.sha256, 512, 7)
    assert torch.equal(other.new_in, model.new_in)
    assert torch.equal(other.new_out, model.new_out)


def test_rows_that_are_damaged_or_of_another_space_are_refused(model, tmp_path):
    save_new_rows(model, tmp_path)
    other = TokenModel(model.llm, TokenSpace(BASE, {**IMAGE, 'sha256': 'zz'}, AUDIO))
    with pytest.raises(SystemExit, match='has another token space: image.sha256'):
        load_new_rows(other, tmp_path)
    body = bytearray((tmp_path / 'trainable_rows.pt').read_bytes())
    body[-200] ^= 1
    (tmp_path / 'trainable_rows.pt').write_bytes(body)
    with pytest.raises(SystemExit, match='is not the file that trainable_rows.json describes'):
        load_new_rows(model, tmp_path)


def test_a_pickle_in_the_place_of_rows_does_not_run(model, tmp_path):
    save_new_rows(model, tmp_path)
    body = pickle.dumps(Opens(tmp_path / 'it_ran'))
    (tmp_path / 'trainable_rows.pt').write_bytes(body)
    change_json(tmp_path / 'trainable_rows.json', sha256=hashlib.sha256(body).hexdigest())
    with pytest.raises(SystemExit) as e:
        load_new_rows(model, tmp_path)
    assert_one_line(e.value, tmp_path, 'cannot read its trainable rows')
    assert not (tmp_path / 'it_ran').exists()


class Opens:
    """Its pickle opens a file when it is loaded."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


@pytest.mark.parametrize('name, content', [
    ('trainable_rows.json', '{}'), ('trainable_rows.json', '[]'), ('trainable_rows.json', '{"sha'),
    ('trainable_rows.json', '[' * 100_000), ('trainable_rows.pt', ''), ('token_space.json', '{"base": NaN}')])
def test_damaged_rows_are_one_line(model, tmp_path, name, content):
    save_new_rows(model, tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as e:
        load_new_rows(model, tmp_path)
    assert_one_line(e.value, tmp_path)


def test_rows_of_another_file_of_tensors_are_one_line(model, tmp_path):
    save_new_rows(model, tmp_path)
    body = io.BytesIO()
    torch.save({'new_in': torch.zeros(36, 32)}, body)  # without new_out
    (tmp_path / 'trainable_rows.pt').write_bytes(body.getvalue())
    change_json(tmp_path / 'trainable_rows.json', sha256=hashlib.sha256(body.getvalue()).hexdigest())
    with pytest.raises(SystemExit) as e:
        load_new_rows(model, tmp_path)
    assert_one_line(e.value, tmp_path, "'new_out'")


# -----------------------------------------------------------------------------
# every writer of the core, on a full disk and beside a user's files


def pictures(n=2, side=64):
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3)).astype(np.uint8)


def write_sheet(folder):
    write_picture(folder.parent / 'a.png', Image.new('RGB', (9, 9)))
    contact_sheet(folder / 'sheet.png', [[folder.parent / 'a.png']] * 8, ['a dark square'] * 8)


def write_log_and_curves(folder):
    records = [{'kind': 'step', 'step': 1, 'window_loss': 2.0},
               {'kind': 'eval', 'step': 1, 'loss': 1.0, 'input_recall_1': 0.5, 'output_recall_1': 0.5}]
    (folder.parent / 'log.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    curves(folder.parent / 'log.jsonl', folder / 'curves.png', ['loss'])


def complete(task, folder, model, tokenizer):
    examples = examples_of(task, task)
    outputs = [example.item.payload.tolist() for example in examples]
    write_completions(folder / task, task, examples, outputs, tokenizer, StubUTI())


WRITERS = {                                            # (its largest file, of which the disk takes less; the writer)
    'a picture': (9_000, lambda folder, *_: write_picture(folder / 'x.png', Image.fromarray(pictures()[0]))),
    'a sound': (9_000, lambda folder, *_: write_sound(folder / 'x.wav', np.ones(9000, np.float32), 8000)),
    'a contact sheet': (900, lambda folder, *_: write_sheet(folder)),
    'curves': (9_000, lambda folder, *_: write_log_and_curves(folder)),
    "B1's pictures": (9_000, lambda folder, *_: save_pictures(folder, pictures(), pictures())),
    "B1's sounds": (9_000, lambda folder, *_: save_sounds(folder, np.ones((2, 9000)), np.ones((2, 9000)), 8000)),
    'golden pictures': (500, partial(complete, 't2i')),
    'golden sounds': (50, partial(complete, 't2a')),
    'new rows': (3_000, lambda folder, model, _: save_new_rows(model, folder)),
    "B3's export": (50_000, lambda folder, model, tokenizer: export_stock(model, tokenizer, folder / 'export')),
    'a tokenizer': (9_000, lambda folder, model, tokenizer: in_whole_folder(folder / 'x', tokenizer)),
}


def in_whole_folder(folder, tokenizer):
    with whole_folder(folder) as beside:
        save_pretrained(tokenizer, beside)


@pytest.mark.parametrize('n_bytes, write', WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_one_line_and_leaves_nothing_half(model, tiny, tmp_path, n_bytes, write):
    tokenizer = AutoTokenizer.from_pretrained(tiny / 'llm')
    folder = tmp_path / 'out'
    folder.mkdir()
    with no_file_larger_than(n_bytes), pytest.raises(SystemExit) as e:
        write(folder, model, tokenizer)
    assert_one_line(e.value, folder, 'cannot write here')
    left = {path for path in folder.rglob('*') if path.is_file()}
    write(folder, model, tokenizer)
    whole = {path: path.stat().st_size for path in folder.rglob('*') if path.is_file()}
    assert left < set(whole) and max(whole.values()) > n_bytes
    assert all(path.stat().st_size == whole[path] for path in left)    # the small ones, written before


@pytest.mark.parametrize('write', [write for _, write in WRITERS.values()], ids=WRITERS)
def test_a_users_own_tmp_stays(model, tiny, tmp_path, write):
    tokenizer = AutoTokenizer.from_pretrained(tiny / 'llm')
    write(tmp_path, model, tokenizer)
    own = set()
    for path in [path for path in tmp_path.rglob('*') if path.name != 'a.png']:
        own.add(path.with_name(path.name + '.tmp'))
    for n, path in enumerate(sorted(own)):
        if n % 2:
            path.write_text('mine')
        else:
            path.mkdir()
            (path / 'mine').touch()
    shutil.rmtree(tmp_path / 'x', ignore_errors=True)  # only a vacant folder is taken
    own = {path for path in own if path.parent.exists()}
    write(tmp_path, model, tokenizer)
    assert all((path / 'mine').exists() or path.read_text() == 'mine' for path in own if path.parent.name != 'export')


@torch.no_grad()
def test_the_export_is_a_stock_model_with_our_logits_to_the_last_bit_and_a_tokenizer_that_spells_them(
        model, tiny, tmp_path):
    folder = tmp_path / 'export'
    folder.mkdir()
    (folder / 'older').touch()                         # a second run of B3 replaces the first one's
    tokenizer = AutoTokenizer.from_pretrained(tiny / 'llm')
    export_stock(model, tokenizer, folder)
    assert not (folder / 'older').exists()
    examples = examples_of(*SIX)
    assert export_difference(model, folder, examples) == 0
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert stock.config.vocab_size == 548 and not stock.config.tie_word_embeddings
    assert torch.equal(stock.lm_head.weight[512:], model.new_out)
    assert torch.equal(stock.get_input_embeddings().weight[512:], model.new_in)
    assert stock.generation_config.eos_token_id == [END, 513, 515]     # text, <|img_end|>, <|aud_end|>
    model.new_out.data[20] += 1e-3                     # the check can fail
    assert export_difference(model, folder, examples) > 0
    model.new_out.data[20] -= 1e-3

    spelling = AutoTokenizer.from_pretrained(folder)
    text = 'a red circle'
    ids = spelling(f'{text}<|img_start|><|image_0|><|image_15|><|img_end|><|audio_1_7|>')['input_ids']
    assert ids == [*tokenizer(text)['input_ids'], 512, 516, 531, 513, 547]
    assert spelling.decode(ids, skip_special_tokens=True) == text


@torch.no_grad()
def test_kernels_that_are_picked_by_the_number_of_rows_are_no_difference_and_a_wrong_row_is(
        model, tiny, tmp_path, monkeypatch):
    """As cuBLAS does: a product with more rows adds up in another order."""
    export_stock(model, AutoTokenizer.from_pretrained(tiny / 'llm'), tmp_path / 'export')
    linear = F.linear
    monkeypatch.setattr(F, 'linear', lambda x, rows, *bias: linear(x, rows, *bias) * (1 + 1e-7 * len(rows)))
    examples = examples_of(*SIX)
    hidden = model.hidden(collate(examples[:1]))
    rows = torch.cat([model.llm.get_output_embeddings().weight, model.new_out])
    assert not torch.equal(model.all_logits(hidden), model.row_logits(hidden, rows))
    assert export_difference(model, tmp_path / 'export', examples) == 0
    monkeypatch.setattr(model, 'all_logits', lambda hidden: model.row_logits(hidden, rows.roll(1, 0)))
    assert export_difference(model, tmp_path / 'export', examples) > 0


def test_bf16_weights_keep_float32_rows_and_agree_with_their_export(model, tiny, tmp_path):
    model.llm.save_pretrained(tmp_path / 'base')
    half = TokenModel(load_llm(tmp_path / 'base', torch.bfloat16), SPACE, noise=0.3)
    half(collate(examples_of(*SIX))).backward()
    assert half.new_in.dtype == half.new_in.grad.dtype == torch.float32
    export_stock(half, AutoTokenizer.from_pretrained(tiny / 'llm'), tmp_path / 'export')
    assert export_difference(half, tmp_path / 'export', examples_of(*SIX)) == 0
    assert text_difference(half, [text_example(range(9))]) == 0
