"""grounding.py: every measure by hand; and twins of a run that sees, each of which has learned something else: which
gates stop it."""
import math

import numpy as np
import pytest
from conftest import REPO, TINY, build_once, failed_gates, read_gates, read_json, run_here, write_config
from tiny_worlds import make_pairs

import gates
import grounding
from grounding import Prediction


def predicted(truth, text, question='', cut=False):
    return Prediction(truth, text, is_cut=cut, truth_is_cut=False, question=question)


# -----------------------------------------------------------------------------
# losses


def test_the_share_removed_is_token_weighted():
    # 10 nats of 40: the mean of the items' shares would be (0.9 + 0.5) / 2
    found = grounding.share_removed([1.0, 9.0] * 4, [10.0, 10.0] * 4)
    assert found.value == pytest.approx(1 - 40 / 80) and found.low < found.value < found.high and found.n == 8
    assert grounding.share_removed([2.0] * 8, [2.0] * 8).value == 0


@pytest.mark.parametrize('keys, n_items, size, sizes', [
    ([(i, i) for i in range(100)], 64, 32, [32, 32]),
    ([(i, i) for i in range(100)], 40, 32, [32]),
    ([(i, i) for i in range(20)], 64, 32, [20]),
    ([(i, i % 4) for i in range(40)], 40, 32, [4] * 10),       # four captions: four can be told apart
    ([(i // 2, i) for i in range(100)], 100, 32, [32] * 2),    # two captions of each picture
    ([(0, i) for i in range(10)], 8, 32, [1] * 8)])
def test_no_two_of_a_set_share_an_input_or_an_output(keys, n_items, size, sizes):
    sets = grounding.matching_sets(keys, n_items, seed=1, size=size)
    assert [len(members) for members in sets] == sizes
    assert sets == grounding.matching_sets(keys, n_items, seed=1, size=size)
    for members in sets:
        for part in zip(*(keys[i] for i in members)):
            assert len(set(part)) == len(members)
    chosen = [i for members in sets for i in members]
    assert len(set(chosen)) == len(chosen)


def test_a_set_holds_inputs_of_one_kind_and_each_kind_has_its_share():
    keys = [(i, i) for i in range(120)]
    kinds = [2 if i % 3 == 0 else 1 for i in keys and range(120)]      # pictures of a chat
    sets = grounding.matching_sets(keys, 120, seed=1, size=20, kinds=kinds)
    assert [({kinds[i] for i in members}, len(members)) for members in sets] == 4 * [({1}, 20)] + 2 * [({2}, 20)]
    assert grounding.matching_sets(keys, 120, seed=1, kinds=[1] * 120) == grounding.matching_sets(keys, 120, seed=1)


def test_the_ranks_of_a_small_table_are_those_found_by_hand():
    crossed = np.array([[[1.0, 8.0, 5.0],              # [i, j]: output j given input i
                         [2.0, 3.0, 5.0],
                         [3.0, 9.0, 5.0]]])
    # of output 0 the first input is the best, of output 1 the second; output 2 looks at none: its input comes last
    assert grounding.input_ranks(crossed).tolist() == [[1, 1, 3]]
    # less the means 2, 20/3 and 5: rows (-1, 4/3, 0), (0, -11/3, 0), (1, 7/3, 0)
    assert grounding.output_ranks(crossed).tolist() == [[1, 1, 1]]
    found = grounding.retrieval(crossed)
    assert found['input_recall_1'] == pytest.approx(2 / 3) and found['input_recall_5'] == 1
    assert found['input_median_rank'] == 1


def test_a_likely_sentence_is_not_a_right_one():
    """One caption is the likeliest under every picture; less its mean, each picture has its own."""
    crossed = 10 - np.eye(8)[None] * np.ones((1, 8, 8))
    crossed[:, :, 3] -= 9
    assert (crossed[0].argmin(1) == 3).all()
    assert grounding.output_ranks(crossed).tolist() == [[1] * 8]


@pytest.mark.parametrize('table', [np.ones((2, 8, 8)), np.full((2, 8, 8), math.nan)])
def test_a_model_that_looks_at_nothing_finds_nothing_and_nan_neither(table):
    assert grounding.input_ranks(table).tolist() == grounding.output_ranks(table).tolist() == [[8] * 8] * 2
    assert not any(gate.passed for gate in gates.retrieval_gates(table, 'a', 'b', 0.0, 0.0))


@pytest.mark.parametrize('n, bar, bar_there', [
    (32, 0.4, 0.4), (32, -1.0, -1.0), (2, 0.4, 0.5 + 0.5 * (0.4 - 1 / 32) / (31 / 32)), (1, 0.4, 1.0), (8, 1.0, 1.0)])
def test_the_bar_of_a_small_set_is_as_far_above_a_guess(n, bar, bar_there):
    assert gates.bar_among(n, bar) == pytest.approx(bar_there)


@pytest.mark.parametrize('n', [1, 2, 3, 5])
def test_a_blind_model_fails_where_only_few_outputs_differ_and_one_that_sees_passes(n):
    """Answers yes and no make sets of 2, in which half of all guesses are right; a single answer makes sets of 1."""
    for seed in range(5):
        noise = np.random.default_rng(seed).normal(size=(128 // n, n, n))
        assert not any(gate.passed for gate in gates.retrieval_gates(noise, 'a', 'b', 0.4, 0.25))
        seen = noise - 9 * np.eye(n)
        found = gates.retrieval_gates(seen, 'a', 'b', 0.4, 0.25)
        assert [gate.passed for gate in found] == [n > 1] * 2 and f'0.4 among 32, but only {n} differ' in found[0].bar


def test_the_crossed_share_is_that_of_the_mean_of_the_others():
    crossed = np.full((1, 8, 8), 4.0) - 3 * np.eye(8)
    assert grounding.crossed_share(crossed).value == 0.75


# -----------------------------------------------------------------------------
# texts


@pytest.mark.parametrize('text, is_stammered', [
    ('a picture of a picture of a mouse', True), ('red red red', False), ('red blue red blue', True),
    ('a red ball beside a red cube', False), ('Oh no, oh no!', True), ('', False), ('一只猫一只猫', True)])
def test_a_phrase_twice_in_a_row_is_stammered(text, is_stammered):
    assert grounding.stammers(text) is is_stammered


def test_the_shares_of_texts_are_counted():
    texts = ['a cat', 'A  cat', '', 'a dog a dog', 'two dogs']
    assert grounding.text_shares(texts, [True] + [False] * 4) == {
        'distinct': 0.8, 'commonest': 0.4, 'stammering': 0.2, 'empty': 0.2, 'cut': 0.2}


def test_a_text_is_nearer_to_its_own_truth_by_the_f1_of_its_words():
    found = grounding.own_truth([
        predicted('red cat', 'red cat'), predicted('blue dog', 'blue cat'), predicted('red dog', 'red dog')])
    # own: 1, 1/2, 1; others: (0 + 1/2) / 2, (1/2 + 0) / 2, (1/2 + 1/2) / 2
    assert found.value == pytest.approx((3 / 4 + 1 / 4 + 1 / 2) / 3)


def test_an_answer_is_compared_with_other_answers_to_its_question():
    """Colours to a question for a colour, numbers to one for a number: that much is in the question."""
    chats = []
    for colour, number in ('red', 'one'), ('blue', 'two'), ('red', 'three'):
        chats += [predicted(colour, 'red', 'Which colour?'), predicted(number, 'one', 'How many?')]
    # for each question one wrong answer takes what a right one gives
    assert grounding.own_truth(chats).value == pytest.approx((1 + 1 - 1 + 1 - 1 / 2 - 1 / 2) / 6)


def test_where_all_truths_are_one_there_is_nothing_to_compare():
    for predictions in [predicted('a', 'a')] * 9, []:
        assert math.isnan(grounding.own_truth(predictions).value)


def test_phrases_that_two_texts_share():
    assert grounding.shared_phrases(['a b c d e f'], ['x a b c d e']) == 0.5
    assert grounding.shared_phrases(['a b'], ['a b']) != grounding.shared_phrases(['a b'], ['a b'])   # none: NaN


GOOD = [predicted(f'a {word} thing', f'one {word} thing') for word in 'abcdefgh']


@pytest.mark.parametrize('texts, failed', [
    (GOOD, []),
    ([s._replace(text='one a thing') for s in GOOD], ['different ones', 'the commonest one', 'nearer']),
    ([s._replace(text=f'{s.text} {s.text}') for s in GOOD], ['stammering']),
    ([s._replace(text='') for s in GOOD[:2]] + GOOD[2:], ['the commonest one', 'empty']),
    ([s._replace(is_cut=True) for s in GOOD], ['cut']),
    ([s._replace(text=GOOD[i - 1].text) for i, s in enumerate(GOOD)], ['nearer']),
    ([], ['different ones', 'the commonest one', 'stammering', 'empty', 'cut', 'nearer']),
    (GOOD[:1], ['different ones', 'nearer']),          # alone it is like no other
    (GOOD[:7], ['nearer'])])                           # too few for an interval
def test_one_fault_of_what_is_said_fails_its_gate(texts, failed):
    found = gates.text_gates('captions', texts, distinct=0.5, commonest=0.1, malformed=0.1, own_truth=0.01)
    assert [gate.name.split(': ')[1].split(' to ')[0] for gate in found if not gate.passed] == failed


def test_the_text_gate_says_what_it_shares_with_the_replayed_text():
    assert gates.text_gate(0.01, 0.02, 0.0).bar == '<= 0.02'
    gate = gates.text_gate(0.01, 0.02, 0.97)
    assert gate.passed and gate.bar == '<= 0.02; 97% of its phrases of five words are in the replayed text'
    assert not gates.text_gate(math.nan, 0.02, 0.0).passed


# -----------------------------------------------------------------------------
# twins of one run, 100 steps over the pairs of colours


LOOKS = {'image of its caption found among 16, recall@1', 'caption of its image found among 16, recall@1'}
REMOVES = {gates.SHARE_REMOVED}
COLLAPSE = {'captions: different ones', 'captions: the commonest one'}
NEARER = {'captions: nearer to their own truth, F1 of words'}
COSTS = {'shuffled image costs more than the right one'}
FORWARD = '        loss_sum = model(batch.to(device))\n'
TWINS = {                      # name: (steps, a line before FORWARD, gates that it fails; of others it may fail any)
    'it sees': (100, '', set()),
    'it has begun': (2, '', REMOVES | LOOKS | COLLAPSE | NEARER),
    'it sees one half': (100, '        batch.images[..., 16:] = 127\n', LOOKS),
    'it sees nothing': (100, '        batch.images = torch.full_like(batch.images, 127)\n',
                        REMOVES | LOOKS | COLLAPSE | NEARER | COSTS),
    'captions dealt to others': (100, '        batch.images = batch.images.roll(1, 0)\n',
                                 REMOVES | LOOKS | COLLAPSE | NEARER | COSTS),
    'one good caption': (100, '', REMOVES | LOOKS | COLLAPSE | NEARER),
}


@pytest.fixture(scope='module')
def pairs_config(tiny, tmp_path_factory):
    """gate_win is lower than the script's: who sees one half wins in 7 of 8 items, here of 64."""
    pairs = build_once(tmp_path_factory, 'pairs', lambda folder: make_pairs(folder, tiny))
    return write_config(
        tmp_path_factory.mktemp('pairs_config') / 'pairs.py', **{**TINY, 'max_new_tokens': 6},
        data_json=pairs / 'pictures' / 'captions.json', image_root=pairs / 'pictures', llm=pairs / 'llm',
        vision=tiny / 'vision', num_image_tokens=4, connector_width=32, connector_depth=1, connector_heads=2,
        max_seq_len=128, gate_win=0.7, global_batch_size=16, micro_batch_size=16, learning_rate=5e-3,
        eval_every=1000, n_eval=64, n_golden=16, n_predictions=32)


@pytest.mark.stage
@pytest.mark.parametrize('name', TWINS)
def test_a_twin_that_has_not_learned_to_look_is_stopped(pairs_config, tmp_path, name):
    n_steps, line, fails = TWINS[name]
    source = (REPO / 'train_a1.py').read_text()
    assert source.count(FORWARD) == 1
    source = source.replace(FORWARD, line + FORWARD)
    if name == 'one good caption':
        loads = "load_split(examples, out / 'split.json', n_eval)\n"
        assert source.count(loads) == 1
        source = source.replace(loads, f'{loads}train_set = [train_set[0]] * len(train_set)\n')
    (tmp_path / 'twin.py').write_text(source)
    code, printed = run_here(tmp_path / 'twin.py', pairs_config, f'--out_dir={tmp_path}/out',
                             f'--epoch_samples={16 * n_steps}')
    assert fails <= failed_gates(tmp_path / 'out') and code == bool(fails), printed
    assert gates.looked(gates.read_verdict(tmp_path / 'out' / 'gates.json')[0]) is (not fails)
    if name == 'it sees one half':                     # what a picture costs does not show it
        assert not (REMOVES | COSTS) & failed_gates(tmp_path / 'out')
    worth = read_json(tmp_path / 'out' / 'gates.json')['worth']['']
    assert worth['share removed'] == pytest.approx(read_gates(tmp_path / 'out')[gates.SHARE_REMOVED]['value'], abs=1e-4)
    assert 'share removed' in printed and len(worth) == 4
