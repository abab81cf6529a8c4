"""token_model.py: new rows, the typed head, what stays as it was, sampling under the grammar, the export."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_uti import AUDIO, IMAGE
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from data import Curriculum, Record, Row, collate, mixture, prompt_of, ramped, token_row, with_prompt
from model import load_llm, pick
from token_model import (
    TokenLM, export, export_difference, load_rows, random_media, read_text, row_losses, row_sums, save_rows,
    swapped_media, swapped_prompts, text_difference, training_bytes, write_codes)
from uti import Grammar, TokenSpace

N_TEXT, END = 512, 2                                   # of the tiny world's language model
SPACE = TokenSpace({'name': 'tiny', 'text_rows': N_TEXT, 'tokenizer_sha256': 'ab', 'end_of_text': END}, IMAGE, AUDIO)
GRAMMAR = Grammar(SPACE)                               # 512 text, 4 special, 16 image, 8 and 8 audio: 548 in all


@pytest.fixture(scope='module', params=['tied', 'untied'])
def lm(request, tiny, tmp_path_factory):
    """A TokenLM with large random weights: every id and every row moves the losses."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = Qwen3Config.from_pretrained(tiny / 'llm')
    config.tie_word_embeddings = request.param == 'tied'
    stock = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for p in stock.parameters():
            if p.ndim >= 2:
                p.normal_(std=0.3)
    stock.save_pretrained(folder)
    return TokenLM(load_llm(folder), SPACE, noise=0.3)


def record(task, seed, n_text=5):
    modality = 'image' if 'i' in task else 'audio'
    rng = np.random.default_rng(seed)
    payload = rng.integers(*GRAMMAR.bounds(GRAMMAR.payload_ranges[modality])).astype(np.int32)
    return Record(f'{task} {seed}', modality, payload, rng.integers(3, 500, n_text).astype(np.int32), f'file {seed}')


def rows_of(*tasks, n_text=5):
    return [token_row(record(task, seed, n_text + seed), task, GRAMMAR, 64) for seed, task in enumerate(tasks)]


FOUR = 'i2t', 't2a', 'a2t', 't2i', 'i2t', 't2i'


def batch_of(rows):
    return collate(rows, [None] * len(rows), 0)


@torch.no_grad()
def by_hand(lm, row, typed):
    """Loss of each label of one row: whole matrices, a stock forward, the softmax over a mask of what is legal."""
    embeds = torch.cat([lm.llm.get_input_embeddings().weight, lm.new_in])[torch.from_numpy(row.ids).long()]
    hidden = lm.llm.model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0]
    logits = hidden @ torch.cat([lm.llm.get_output_embeddings().weight, lm.new_out]).T
    losses = []
    for place, index in zip(row.labelled.tolist(), row.ranges.tolist()):
        legal = SPACE.ranges[index]
        kept = logits[place - 1, legal.first:legal.end] if typed else logits[place - 1]
        losses.append((kept.logsumexp(0) - logits[place - 1, row.ids[place]]).item())
    return losses


# -----------------------------------------------------------------------------
# losses and gradients

@pytest.mark.parametrize('typed', [True, False])
def test_losses_are_the_cross_entropy_worked_out_by_hand(lm, typed):
    rows = rows_of(*FOUR)
    lm.typed_head = typed
    batch = batch_of(rows)
    found, want = lm.nll(batch).detach(), [by_hand(lm, row, typed) for row in rows]
    lm.typed_head = True
    order = np.argsort(np.concatenate([r.ranges for r in rows]), kind='stable')
    np.testing.assert_allclose(found.numpy(), np.concatenate(want)[order], rtol=2e-4, atol=1e-5)
    sums = torch.zeros(len(rows)).index_add(0, batch.label_rows, found)
    np.testing.assert_allclose(sums.numpy(), [sum(w) for w in want], rtol=1e-4)
    np.testing.assert_allclose(sum(map(sum, want)), lm(batch).item() if typed else sum(map(sum, want)), rtol=1e-4)


@pytest.mark.parametrize('typed', [True, False])
def test_gradients_are_those_of_whole_matrices_and_reach_the_new_rows_only(lm, typed):
    rows, V = rows_of(*FOUR), N_TEXT
    lm.typed_head = typed
    lm.zero_grad()
    lm(batch_of(rows)).backward()
    lm.typed_head = True
    assert {n for n, p in lm.named_parameters() if p.grad is not None} == {'new_in', 'new_out'}
    whole = [torch.cat([base.weight, new]).detach().requires_grad_() for base, new in (
        (lm.llm.get_input_embeddings(), lm.new_in), (lm.llm.get_output_embeddings(), lm.new_out))]
    for row in rows:
        ids = torch.from_numpy(row.ids).long()
        hidden = lm.llm.model(inputs_embeds=whole[0][ids][None], use_cache=False).last_hidden_state[0]
        logits = hidden @ whole[1].T
        for place, index in zip(row.labelled.tolist(), row.ranges.tolist()):
            legal = SPACE.ranges[index] if typed else SimpleNamespace(first=0, end=SPACE.total)
            F.cross_entropy(logits[place - 1, legal.first:legal.end], ids[place] - legal.first).backward(
                retain_graph=True)
    for mine, full in (lm.new_in, whole[0]), (lm.new_out, whole[1]):
        assert torch.allclose(mine.grad, full.grad[V:], rtol=1e-3, atol=1e-5 * full.grad.abs().max())
    lm.zero_grad()


def test_new_rows_start_around_the_mean_row_and_another_base_is_refused(lm):
    torch.manual_seed(5)
    fresh = TokenLM(lm.llm, SPACE, noise=0.02)
    base = lm.llm.get_input_embeddings().weight
    assert fresh.new_in.shape == fresh.new_out.shape == (36, 32) and fresh.new_in.dtype == torch.float32
    away = fresh.new_in.detach() - base.mean(0)
    assert 0.015 < away.std() < 0.025 and not torch.equal(fresh.new_in, fresh.new_out)
    with pytest.raises(SystemExit, match='has 512 embedding rows, the token space counts 500 text rows'):
        TokenLM(lm.llm, TokenSpace({**SPACE.base, 'text_rows': 500}, IMAGE, AUDIO))


def test_packed_rows_do_not_see_each_other(lm):
    one, two = rows_of(*FOUR), rows_of(*FOUR)
    two[1] = token_row(record('t2a', 99, n_text=12), 't2a', GRAMMAR, 64)
    a, b = row_losses(lm, one, 6), row_losses(lm, two, 6)
    others = [0, 2, 3, 4, 5]
    np.testing.assert_allclose(a[others], b[others], rtol=1e-5)
    assert abs(a[1] - b[1]) > 0.1
    np.testing.assert_allclose(a, row_losses(lm, one, 1), rtol=1e-5)


def test_text_has_the_probabilities_of_the_base_to_the_last_bit_under_the_typed_head_alone(lm):
    ids = [np.random.default_rng(n).integers(0, N_TEXT, n).astype(np.int32) for n in (2, 9, 40)]
    rows = [Row(SimpleNamespace(id='x'), i, np.arange(1, len(i)), -1, False) for i in ids]
    assert text_difference(lm, rows) == 0
    lm.typed_head = False
    leaked = text_difference(lm, rows)
    lm.typed_head = True
    assert leaked > 0.01
    base, lm.new_in.data[0, 0] = lm.new_in.data[0, 0].item(), float('nan')
    assert text_difference(lm, rows) == 0              # a row that no text uses cannot move text
    lm.new_in.data[0, 0] = base


def test_bytes_are_smaller_than_for_full_matrices_by_their_rows(lm):
    optimizer = torch.optim.AdamW([lm.new_in, lm.new_out], lr=0.0)
    lm(batch_of(rows_of(*FOUR))).backward()
    optimizer.step()
    lm.zero_grad()
    found, matrices = training_bytes(lm, optimizer), 1 if lm.llm.config.tie_word_embeddings else 2
    assert found == {'gradient': 36 * 32 * 4 * 2, 'optimizer': 36 * 32 * 4 * 2 * 2,
                     'full_gradient': 548 * 32 * 4 * matrices, 'full_optimizer': 548 * 32 * 4 * matrices * 2}


# -----------------------------------------------------------------------------
# ablation

def test_swapped_media_is_never_an_items_own_even_when_several_texts_share_it():
    rows = [token_row(Record(f'{m} {k}', 'image', record('i2t', m).payload, np.array([5, 6]), f'file {m}'), 'i2t',
                      GRAMMAR, 64) for m in range(6) for k in range(1 + m % 3)]
    swapped = swapped_media(rows, 4, seed=1)
    given = [r.ids[1:5].tolist() for r in swapped]
    assert all(g != r.ids[1:5].tolist() for g, r in zip(given, rows))
    assert sorted(given) == sorted(r.ids[1:5].tolist() for r in rows)          # dealt: each is given as often as it is
    for row, other in zip(rows, swapped):
        assert row.ids[[0, *range(5, len(row))]].tolist() == other.ids[[0, *range(5, len(row))]].tolist()
    assert given == [r.ids[1:5].tolist() for r in swapped_media(rows, 4, seed=1)]


def test_random_media_is_legal_in_every_place():
    rows = rows_of('a2t', 'a2t', 'a2t')
    for row, other in zip(rows, random_media(rows, GRAMMAR, 'audio', seed=1)):
        GRAMMAR.check_payload('audio', other.ids[1:5])
        assert other.ids[1:5].tolist() != row.ids[1:5].tolist() and other.ids[5:].tolist() == row.ids[5:].tolist()


def test_a_writing_row_behind_another_prompt_is_the_document_of_that_prompt():
    for task in 't2i', 't2a':
        row = token_row(record(task, 1), task, GRAMMAR, 64)
        for text in [9, 8, 7], []:
            wanted = GRAMMAR.document(task, row.item.payload, text)
            got = with_prompt(row, text)
            for name in 'ids', 'labelled', 'ranges':
                np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name))
            assert prompt_of(got).tolist() == text


def test_swapped_prompts_are_never_an_items_own_words_even_when_several_items_share_them():
    rows = [with_prompt(token_row(record('t2i', n), 't2i', GRAMMAR, 64), [5 + min(n, 4)]) for n in range(8)]
    swapped = swapped_prompts(rows, seed=1)
    assert all(prompt_of(a).tolist() != prompt_of(b).tolist() for a, b in zip(rows, swapped))
    assert sorted(prompt_of(r)[0] for r in swapped) == sorted(prompt_of(r)[0] for r in rows)
    for a, b in zip(rows, swapped):
        assert a.ids[a.labelled].tolist() == b.ids[b.labelled].tolist()


def test_labels_with_more_than_half_of_the_probability_are_counted(lm):
    rows = rows_of(*FOUR)
    losses, right = row_sums(lm, rows, 4)
    np.testing.assert_array_equal(losses, row_losses(lm, rows, 4))
    each = [by_hand(lm, row, True) for row in rows]
    assert right.tolist() == [sum(nats < np.log(2) for nats in one) for one in each]


def test_shares_go_in_a_straight_line_from_one_set_of_weights_to_another():
    start, end = {'i2t': 3.0, 't2i': 1.0}, {'i2t': 1.0, 't2i': 1.0, 't2a': 2.0}
    assert ramped(start, end, 0.0) == {'i2t': 0.75, 't2i': 0.25, 't2a': 0.0}
    assert ramped(start, end, 0.5) == {'i2t': 0.5, 't2i': 0.25, 't2a': 0.25}
    assert ramped(start, end, 1.0) == {'i2t': 0.25, 't2i': 0.25, 't2a': 0.5}


def curriculum(shares, dropout=0.0, n=10, seed=3):
    rows = {task: [token_row(record(task, k), task, GRAMMAR, 64) for k in range(n)] for task in ('i2t', 't2i')}
    return Curriculum(rows, shares, 8, dropout, ['t2i'], seed)


def test_a_curriculum_has_the_shares_of_each_step_and_every_row_once_an_epoch():
    """Of 8 rows a fifth is 1.6: 1.6, 3.2, 4.8, 6.4 and 8 are owed after five steps, so 2, 1, 2, 1, 2 are given."""
    train = curriculum([{'i2t': 0.2, 't2i': 0.8}] * 5 + [{'i2t': 1.0, 't2i': 0.0}] * 4)
    assert train.counts[:, 0].tolist() == [2, 1, 2, 1, 2, 8, 8, 8, 8]
    steps = [train.step_rows(step, 8) for step in range(9)]
    assert all(len(rows) == 8 for rows in steps)
    written = [r.item.id for rows in steps for r in rows if r.item.id.startswith('t2i')]
    assert len(written) == 32 and all(written.count(f't2i {k}') in (3, 4) for k in range(10))
    ids = [[r.item.id for r in rows] for rows in steps]
    assert ids == [[r.item.id for r in curriculum([{'i2t': 0.2, 't2i': 0.8}] * 9).step_rows(step, 8)]
                   for step in range(5)] + ids[5:]     # a step knows nothing of the steps after it
    many = Curriculum(train.tasks, [ramped({'i2t': 1}, {'i2t': 1, 't2i': 9}, s / 400) for s in range(400)], 8, seed=1)
    assert (many.counts.sum(1) == 8).all() and abs(many.counts[:, 1].sum() - 0.45 * 3200) < 8


def test_prompts_are_dropped_by_row_and_epoch_alone_in_their_share():
    how = [{'i2t': 0.0, 't2i': 1.0}] * 100
    steps = [curriculum(how, 0.25).step_rows(step, 8) for step in range(100)]
    bare = [not len(prompt_of(r)) for rows in steps for r in rows]
    assert abs(np.mean(bare) - 0.25) < 0.05
    again = curriculum(how, 0.25)
    for step in 99, 7:                                 # in any order, as after a resume
        assert [r.ids.tolist() for r in again.step_rows(step, 8)] == [r.ids.tolist() for r in steps[step]]
    epochs = [{r.item.id for rows in steps[5 * e:5 * e + 5] for r in rows if not len(prompt_of(r))} for e in range(20)]
    assert len(set(map(frozenset, epochs))) > 5        # others are without their prompt in another epoch
    assert not any(not len(prompt_of(r)) for r in curriculum(how, 0.0).step_rows(0, 8))


def test_a_mixture_has_its_shares_holds_every_row_and_repeats_evenly():
    mixed = mixture({'a': list('abcd'), 'b': list('xy'), 'c': ['never']}, {'a': 1.0, 'b': 3.0, 'c': 0.0}, seed=1)
    counts = {row: mixed.count(row) for row in mixed}
    assert counts == {**dict.fromkeys('abcd', 1), **dict.fromkeys('xy', 6)}    # 4 of a are a quarter: 12 of b
    assert mixed == mixture({'a': list('abcd'), 'b': list('xy')}, {'a': 1.0, 'b': 3.0}, seed=1)


# -----------------------------------------------------------------------------
# sampling

PROMPTS = [[7, 8, 9], [11], [30, 31, 32, 33, 34, 35]]


@torch.no_grad()
def recomputed(lm, task, prompt, n, guidance=1.0):
    """Greedy codes of one prompt, every step from nothing, with whole matrices."""
    embed = torch.cat([lm.llm.get_input_embeddings().weight, lm.new_in])
    head = torch.cat([lm.llm.get_output_embeddings().weight, lm.new_out])
    said = []
    for index in GRAMMAR.expected(task)[:n].tolist():
        legal, logits = SPACE.ranges[index], []
        for text in prompt, []:
            ids = torch.tensor([*GRAMMAR.prompt(task, text=text).tolist(), *said])
            hidden = lm.llm.model(inputs_embeds=embed[ids][None], use_cache=False).last_hidden_state[0, -1]
            logits.append((hidden @ head.T)[legal.first:legal.end])
        mixed = logits[1] + guidance * (logits[0] - logits[1])
        said.append(legal.first + mixed.argmax().item())
    return said


@pytest.mark.parametrize('guidance', [1.0, 3.0])
@pytest.mark.parametrize('task', ['t2i', 't2a'])
def test_greedy_codes_are_those_of_a_full_recomputation(lm, task, guidance):
    found = write_codes(lm, GRAMMAR, task, PROMPTS, temperature=0.0, guidance=guidance)
    assert found.tolist() == [recomputed(lm, task, p, 4, guidance) for p in PROMPTS]


def test_guidance_of_one_is_none_and_more_counts(lm, monkeypatch):
    plain = write_codes(lm, GRAMMAR, 't2i', PROMPTS, seeds=[1, 2, 3])
    nearly = write_codes(lm, GRAMMAR, 't2i', PROMPTS, seeds=[1, 2, 3], guidance=1.0 + 1e-6)   # runs the rows beside
    assert plain.tolist() == nearly.tolist()
    assert plain.tolist() != write_codes(lm, GRAMMAR, 't2i', PROMPTS, seeds=[1, 2, 3], guidance=6.0).tolist()


@pytest.mark.parametrize('how', [{}, {'temperature': 0.7, 'top_k': 5}, {'top_p': 0.8, 'guidance': 2.0}])
def test_codes_have_exact_length_legal_ids_and_do_not_depend_on_batch_mates(lm, how):
    for task, modality in ('t2i', 'image'), ('t2a', 'audio'):
        together = write_codes(lm, GRAMMAR, task, PROMPTS, seeds=[5, 6, 7], **how)
        for codes in together:
            GRAMMAR.check_payload(modality, codes)
        alone = [write_codes(lm, GRAMMAR, task, [p], seeds=[s], **how)[0].tolist() for p, s in zip(PROMPTS, (5, 6, 7))]
        assert together.tolist() == alone
        assert together.tolist() != write_codes(lm, GRAMMAR, task, PROMPTS, seeds=[8, 9, 10], **how).tolist()


def test_reading_cannot_leave_the_text_and_a_reading_task_writes_no_codes(lm):
    lm.new_out.data += 50                              # rows that would win every argmax
    payloads = [record('i2t', n).payload for n in range(3)]
    said = read_text(lm, GRAMMAR, 'i2t', payloads, 8)
    lm.new_out.data -= 50
    assert all(0 <= i < N_TEXT and i != END for ids in said for i in ids) and any(said)
    assert said[1] == read_text(lm, GRAMMAR, 'i2t', payloads[1:2], 8)[0]
    with pytest.raises(SystemExit, match="task 'i2t' writes no payload"):
        write_codes(lm, GRAMMAR, 'i2t', PROMPTS)


@pytest.mark.parametrize('top_k, kept', [(1, {2}), (2, {2, 0}), (0, {2, 0, 1}), (9, {2, 0, 1})])
def test_top_k_keeps_the_likeliest(top_k, kept):
    logits = torch.tensor([[0.3, 0.2, 0.5]]).log()
    assert {pick(logits, 1.0, 1.0, [torch.Generator().manual_seed(s)], top_k).item() for s in range(100)} == kept


# -----------------------------------------------------------------------------
# what others load

def test_saved_rows_load_with_weights_only_and_come_back(lm, tmp_path):
    save_rows(lm, tmp_path, step=7)
    state = torch.load(tmp_path / 'trainable_rows.pt', weights_only=True)
    assert {n: tuple(t.shape) for n, t in state.items()} == {'new_in': (36, 32), 'new_out': (36, 32)}
    meta = json.loads((tmp_path / 'trainable_rows.json').read_text())
    assert (meta['token_space'], meta['first_id'], meta['step']) == (SPACE.sha256, 512, 7)
    other = TokenLM(lm.llm, SPACE)
    load_rows(other, tmp_path)
    assert torch.equal(other.new_in, lm.new_in) and torch.equal(other.new_out, lm.new_out)


def test_rows_that_are_damaged_or_of_another_space_are_refused(lm, tmp_path):
    save_rows(lm, tmp_path)
    other = TokenLM(lm.llm, TokenSpace(SPACE.base, {**IMAGE, 'sha256': 'zz'}, AUDIO))
    with pytest.raises(SystemExit, match='has another token space: image.sha256'):
        load_rows(other, tmp_path)
    body = bytearray((tmp_path / 'trainable_rows.pt').read_bytes())
    body[-200] ^= 1
    (tmp_path / 'trainable_rows.pt').write_bytes(body)
    with pytest.raises(SystemExit, match='is not the file that trainable_rows.json describes'):
        load_rows(lm, tmp_path)


@torch.no_grad()
def test_the_export_is_a_stock_model_with_our_logits_to_the_last_bit_and_a_tokenizer_that_spells_them(
        lm, tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny / 'llm')
    export(lm, tokenizer, tmp_path / 'export')
    rows = rows_of(*FOUR)
    assert export_difference(lm, tmp_path / 'export', rows) == 0
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / 'export')
    assert stock.config.vocab_size == 548 and not stock.config.tie_word_embeddings
    assert torch.equal(stock.lm_head.weight[512:], lm.new_out)
    assert torch.equal(stock.get_input_embeddings().weight[512:], lm.new_in)
    lm.new_out.data[20] += 1e-3                        # the check can fail
    assert export_difference(lm, tmp_path / 'export', rows) > 0
    lm.new_out.data[20] -= 1e-3
    spelled = AutoTokenizer.from_pretrained(tmp_path / 'export')
    text = 'a red circle'
    written = f'{text}<|img_start|><|image_0|><|image_15|><|img_end|><|audio_1_7|>'
    assert spelled(written)['input_ids'] == [*tokenizer(text)['input_ids'], 512, 516, 531, 513, 547]
    assert spelled.decode(spelled(written)['input_ids'], skip_special_tokens=True) == text


def test_bf16_weights_keep_float32_rows_and_agree_with_their_export(lm, tiny, tmp_path):
    lm.llm.save_pretrained(tmp_path / 'base')
    half = TokenLM(load_llm(tmp_path / 'base', torch.bfloat16), SPACE, noise=0.3)
    half(batch_of(rows_of(*FOUR))).backward()
    assert half.new_in.dtype == half.new_in.grad.dtype == torch.float32
    export(half, AutoTokenizer.from_pretrained(tiny / 'llm'), tmp_path / 'export')
    assert export_difference(half, tmp_path / 'export', rows_of(*FOUR)) == 0
    text = Row(SimpleNamespace(id='x'), np.arange(9, dtype=np.int32), np.arange(1, 9), -1, False)
    assert text_difference(half, [text]) == 0
