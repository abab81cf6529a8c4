"""
Gates: numbers in, verdicts out. Each stage measures, this file judges, and the stage's exit status says.

As a script, the report card of one stage or of every stage below a folder, as a table and as a page to look at:

reads   DIR/gates.json, DIR/*/gates.json; for the page whatever else the stages have left there so far
writes  DIR/report.html
done    when every gate found has passed; exits 1 when one has not, or when there is none

$ python gates.py out
$ python gates.py out/a1_small
"""
import io
import json
import math
import re
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

import grounding
from common import finite, new_figure, rank_of, write_atomic


# What a stage is worth: of the loss under another input, the share that the right one removes; recall@1 of the right
# input of an output, and of the right output of an input, in its set; the share of different texts, or codes, it makes
WORTH = ('share removed', 'input found', 'output found', 'different')


class Gate(NamedTuple):
    """value: what was measured; bar: in words, what was wanted; passed: the verdict."""
    name: str
    value: float
    bar: str
    passed: bool


# NaN compares as False with everything: what was not measured has not passed


def at_most(name, value, bar):
    return Gate(name, float(value), f'<= {bar:g}', bool(value <= bar))


def at_least(name, value, bar):
    return Gate(name, float(value), f'>= {bar:g}', bool(value >= bar))


def exactly(name, value, wanted):
    return Gate(name, float(value), f'= {wanted:g}', bool(value == wanted))   # counts, and differences that must be 0


# -----------------------------------------------------------------------------
# what an input is worth


def clears(name, measured, bar):
    """Is a grounding.Estimate above a bar with 95 % confidence? Fewer than 8 items, or a NaN, fail."""
    wanted = f'95 % interval above {bar:g}'
    if measured.n < 8:
        wanted = f'{measured.n} items, wanted 8; {wanted}'
    passed = bool(measured.n >= 8 and measured.low > bar)
    return Gate(name, measured.value, f'{wanted}; [{measured.low:.3f}, {measured.high:.3f}]', passed)


def ablation(name, better, worse, counts, bar, min_win):
    """Is the loss `worse` above `better` by more than `bar` nats per label, with 95 % confidence over the items, and in
    at least the share min_win of them?

    better, worse: summed loss of each item under the two conditions; counts: labels of each item. The difference is
    token weighted, sum / count, and bootstrapped over items. Returns (Gate, {'d', 'low', 'high', 'win'}).
    """
    better = np.asarray(better, dtype=np.float64)
    worse = np.asarray(worse, dtype=np.float64)
    counts = np.asarray(counts, dtype=np.float64)
    difference = worse - better                        # item by item: what makes an item hard cancels out

    def nats_per_label(picks):
        return difference[picks].sum(-1) / np.maximum(counts[picks].sum(-1), 1)

    measured = grounding.estimate(nats_per_label, len(counts) if counts.sum() else 0)
    win = (worse > better).mean() if measured.n else math.nan
    gate = clears(name, measured, bar)
    gate = gate._replace(bar=f'{gate.bar}, win {win:.3f} >= {min_win:g}', passed=gate.passed and bool(win >= min_win))
    return gate, {'d': measured.value, 'low': measured.low, 'high': measured.high, 'win': float(win)}


SHARE_REMOVED = "share of another image's loss that the right one removes"
FOUND = 'recall@1'


def looked(verdicts):
    """Do these gates say that the model looks at its input? False where they were not measured."""
    asked = [gate.passed for gate in verdicts if gate.name == SHARE_REMOVED or gate.name.endswith(FOUND)]
    return bool(asked) and all(asked)


def retrieval_gates(crossed, input_name, output_name, input_bar, output_bar):
    """Do the likelihoods find the right input of an output, and the right output of an input, among those of a set?

    crossed: (sets, n, n) of crossed_losses; names: 'picture of a caption'; bars: of recall@1 among 32, see bar_among.
    """
    n = crossed.shape[-1]
    gates = []
    for name, ranks, bar in ((input_name, grounding.input_ranks(crossed), input_bar),
                             (output_name, grounding.output_ranks(crossed), output_bar)):
        gate = clears(f'{name} found among {n}, {FOUND}', grounding.recall(ranks), bar_among(n, bar))
        if n < grounding.SET_SIZE:
            gate = gate._replace(bar=f'{gate.bar}; {bar:g} among {grounding.SET_SIZE}, but only {n} differ')
        gates.append(gate)
    return gates


def bar_among(n, bar):
    """The bar of recall@1 in sets of n that is as far on the way from a guess to 1 as `bar` is in sets of 32.

    A guess is right in 1 / n: in sets of 2 it would clear a bar of 0.4 by itself. In sets of 1 nothing clears this one.
    """
    guess = 1 / n
    usual_guess = 1 / grounding.SET_SIZE
    return guess + (1 - guess) * (bar - usual_guess) / (1 - usual_guess)


def text_gates(name, predictions, distinct, commonest, malformed, own_truth=None):
    """Fail a model that says the same to everything, stammers, says nothing or does not end.

    name: of the texts, 'captions'; predictions: [grounding.Prediction]; distinct: least share of different texts, as a
    part of the truths' own; commonest, malformed: how much larger than the truths' own the share of the commonest
    text, and those of stammering, empty and cut ones, may be; own_truth: how much nearer a text has to be to its own
    truth than to others, as F1 of words.
    """
    made, true = grounding.prediction_shares(predictions)
    gates = [
        # a single text differs from all others
        at_least(f'{name}: different ones', made['distinct'] if len(predictions) > 1 else math.nan,
                 distinct * true['distinct']),
        at_most(f'{name}: the commonest one', made['commonest'], true['commonest'] + commonest),
        at_most(f'{name}: stammering', made['stammering'], true['stammering'] + malformed),
        at_most(f'{name}: empty', made['empty'], true['empty'] + malformed),
        at_most(f'{name}: cut', made['cut'], true['cut'] + malformed),
    ]
    if own_truth is not None:
        gates.append(clears(f'{name}: nearer to their own truth, F1 of words', grounding.own_truth(predictions),
                            own_truth))
    return gates


def no_regression(measured, baseline, same, slack):
    """One gate for each measure that the baseline holds: no worse by more than its slack, an absolute drop where that
    is negative, a share of the baseline's where it is positive (a distance, which must not rise). same: {name: value}
    of what both must have been measured on; where one differs nothing can be compared, and that gate fails."""
    gates = []
    for name, value in same.items():
        # measured on other items, or with another codec, two numbers say nothing about each other
        gates.append(exactly(f'{name} is not that of the baseline', int(baseline.get(name) != value), 0))
    for name, change in slack.items():
        if name not in baseline:
            continue
        value = measured.get(name, math.nan)
        if change < 0:
            gates.append(at_least(f'{name} against the baseline', value, baseline[name] + change))
        else:
            gates.append(at_most(f'{name} against the baseline', value, baseline[name] * (1 + change)))
    return gates


def text_gate(rise, bar, shared):
    """Did the loss on held-out text rise? rise: as a share of the base model's; shared: share of that text's phrases
    that the replayed text has too: a text that was trained on says little of others."""
    gate = at_most('text-only loss, rise over the base model', rise, bar)
    if shared > 0:
        gate = gate._replace(bar=f'{gate.bar}; {shared:.0%} of its phrases of five words are in the replayed text')
    return gate


# -----------------------------------------------------------------------------
# what a stage did

TRUNCATED = 'share of truncated samples'
UNLABELLED = 'samples without a label'
UNDECLARED = 'parameters trained but not declared, or declared but not trained'
LORA_OUTSIDE = "LoRA weights outside the language model's layers"


def training_gates(declared, trainable, with_gradient, before, after):
    """The gates on what was trained: declared, trainable and with_gradient are sets of names; before and after the
    sha256 of everything frozen."""
    without_gradient = set(trainable) - set(with_gradient)   # over the whole run: cut off from the loss
    return [
        declared_gate(declared, trainable),
        exactly('trained parameters without a gradient', len(without_gradient), 0),
        exactly('frozen weights changed (sha256)', int(before != after), 0),
    ]


def declared_gate(declared, trainable):
    """Is what is trained, by its names, what the script says that it trains?"""
    undeclared = set(declared) ^ set(trainable)        # in one of them only
    return exactly(UNDECLARED, len(undeclared), 0)


def label_gates(n, n_truncated, n_unlabelled, max_truncated):
    """The gates on what a stage's n examples lost: cut ones, and ones without a label."""
    return [
        at_most(TRUNCATED, n_truncated / n if n else math.nan, max_truncated),
        exactly(UNLABELLED, n_unlabelled if n else math.nan, 0),
    ]


def lora_gate(names):
    """Of all parameters' names: LoRA is in the language model's layers and nowhere else, the tower for example."""
    # targets such as q_proj are names of the tower's modules too
    outside = [name for name in names if 'lora_' in name and not re.match(r'llm\.[\w.]+\.\d+\.', name)]
    return exactly(LORA_OUTSIDE, len(outside), 0)


# data and settings decide these before the first step; and what helps
CURES = {
    TRUNCATED: 'raise max_seq_len or gate_truncated, or leave the long ones out',
    UNLABELLED: 'raise max_seq_len, or leave these samples out',
    UNDECLARED: 'set lora_targets to modules of the layers that it can train',
    LORA_OUTSIDE: "set lora_targets to modules of the language model's layers",
}


def end_doomed(verdicts, allow_failed_gates=None):
    """Exit with one line, before the first step, when a gate of CURES has failed: the run would fail by it at its end.
    On every rank. With allow_failed_gates the line is printed and the run goes on; None: there is no such setting."""
    failed = [gate for gate in verdicts if not gate.passed]
    if not failed:
        return
    found = '; '.join(f'"{gate.name}": {gate.value:g}, wanted {gate.bar}' for gate in failed)
    line = f'this run would fail at its end by {found}'
    if allow_failed_gates:
        if rank_of()[0] == 0:
            print(f'{line}; it goes on, since allow_failed_gates = True')
        return
    cure = '; '.join(CURES[gate.name] for gate in failed)
    if allow_failed_gates is not None:
        cure += '; or set allow_failed_gates = True to train all the same'
    raise SystemExit(f'{line}: {cure}')


def shard_gates(n_shards, n_wrong_shards, ids, media, n_checked, n_wrong_decodes, n_mismatches, n_examples,
                n_unlabelled, n_truncated):
    """The gates on tokenized shards. ids, media: {split: [id or sha256 of the media file of everything in it]}; the
    others count what was looked at and what of it was wrong. What was not looked at has not passed."""
    def right_share(n, n_wrong):
        return (n - n_wrong) / n if n else math.nan    # a share of nothing fails

    def n_repeated(splits):
        keys = []
        for part in splits.values():
            keys += part
        return len(keys) - len(set(keys)) if keys else math.nan

    return [
        exactly('share of shards with the right sha256 and token space', right_share(n_shards, n_wrong_shards), 1),
        exactly('ids in two splits, or twice in one', n_repeated(ids), 0),
        exactly('media in two splits, or twice in one', n_repeated(media), 0),
        exactly('share of checked media that decode to the right size, finite',
                right_share(n_checked, n_wrong_decodes), 1),
        exactly('checked media that give other ids when encoded again', n_mismatches if n_checked else math.nan, 0),
        exactly('examples without a label', n_unlabelled if n_examples else math.nan, 0),
        exactly('truncated examples', n_truncated if n_examples else math.nan, 0),
    ]


def generation_gates(task, codes, first, end, golden, shapes, n_golden):
    """The gates on what was generated: every id of codes (items, N) is in the range [first, end) of its place, and each
    of the n_golden golden items decoded to its shape, finite."""
    codes = np.asarray(codes)
    n_outside = ((codes < first) | (codes >= end)).sum() if codes.size else math.nan            # (items, N)
    n_right = 0
    for decoded, shape in zip(golden, shapes):
        n_right += np.shape(decoded) == tuple(shape) and bool(np.isfinite(decoded).all())
    return [
        exactly(f'{task}: generated ids outside their range', n_outside, 0),
        exactly(f'{task}: golden items that decode', n_right, n_golden),
    ]


def collapse_gates(task, codes, decoded, distinct, pixel_std=None, rms=None, spectral_std=None):
    """Fail a model that generates the same output, or silence, for every prompt.

    codes: (items, N); decoded: pictures (3, H, W) 0 to 255, or waves; distinct: least share of different outputs;
    pixel_std: of a picture's pixels, mean over the pictures; rms: mean over the sounds; spectral_std: deviation of a
    sound's spectrum from its mean over frequency in dB, mean over the sounds: about 5 for noise.
    """
    codes = np.asarray(codes)
    different = {row.tobytes() for row in codes}       # outputs that differ in at least one code
    # of one output all are distinct, of two at least half: fewer than 8 say nothing
    share = len(different) / len(codes) if len(codes) >= 8 else math.nan
    gates = [at_least(f'{task}: distinct outputs', share, distinct)]

    def mean_of(measure):
        values = [measure(np.asarray(x, dtype=np.float64)) for x in decoded]
        return np.mean(values) if values else math.nan

    if pixel_std is not None:
        gates.append(at_least(f'{task}: pixel deviation', mean_of(np.std), pixel_std))
    if rms is not None:
        gates.append(at_least(f'{task}: RMS', mean_of(root_mean_square), rms))
    if spectral_std is not None:
        gates.append(at_least(f'{task}: spectral deviation in dB', mean_of(spectral_deviation), spectral_std))
    return gates


def root_mean_square(wave):
    return np.sqrt((wave ** 2).mean())


def spectral_deviation(wave):
    """In dB."""
    power = np.abs(np.fft.rfft(wave * np.hanning(len(wave)))) ** 2     # the window keeps a tone from smearing
    return (10 * np.log10(power + 1e-12)).std()        # the floor: digital silence has no logarithm


# -----------------------------------------------------------------------------
# the verdict of a stage, written and read


def table(gates):
    width = max((len(gate.name) for gate in gates), default=0)
    lines = []
    for gate in gates:
        verdict = 'pass' if gate.passed else 'FAIL'
        lines.append(f'{verdict}  {gate.name:<{width}}  {gate.value:10.4f}  {gate.bar}')
    return '\n'.join(lines)


def worth(share_removed, crossed, distinct):
    """What a stage is worth: see WORTH. crossed: of crossed_losses; distinct: share of different ones it has made."""
    found = grounding.retrieval(crossed)
    values = (share_removed, found['input_recall_1'], found['output_recall_1'], distinct)
    return dict(zip(WORTH, (round(float(value), 4) for value in values)))


def worth_table(rows):
    """rows: {name: of worth}."""
    width = max((len(name) for name in rows), default=0)
    lines = [f'{"":{width}}  ' + '  '.join(WORTH)]
    for name, measured in rows.items():
        cells = [f'{float(measured.get(column, math.nan)):{len(column)}.3f}' for column in WORTH]
        lines.append(f'{name:{width}}  ' + '  '.join(cells))
    return '\n'.join(lines)


def write_gates(out_dir, gates, worth=None, **measured):
    """Write out_dir/gates.json; True when all passed."""
    measured = {'worth': worth, **measured} if worth else measured
    passed = bool(gates) and all(gate.passed for gate in gates)        # no gate at all is no pass
    record = {'passed': passed, 'gates': [gate._asdict() for gate in gates], **measured}
    write_atomic(Path(out_dir) / 'gates.json', json.dumps(finite(record), indent=1, allow_nan=False))
    return passed


def conclude(out_dir, gates, worth=None, **measured):
    """write_gates, print the verdicts, and return the exit status: 0 when all passed, else 1.

    worth: {task, or '' where there is one: what worth() gives}; printed first.
    """
    passed = write_gates(out_dir, gates, worth, **measured)
    verdict = f'{len(gates)} gates passed'
    if not passed:
        failed = [gate.name for gate in gates if not gate.passed] or ['no gate was measured']
        verdict = f'FAILED at: {"; ".join(failed)}'
    if worth:
        print(worth_table(worth))
    print(table(gates))
    print(f'{out_dir}: {verdict}')
    return 0 if passed else 1


def require_passed(folder, allow_failed_gates):
    """A stage takes only an input whose gates passed, unless the user says otherwise."""
    if not Path(folder).is_dir():
        raise SystemExit(f'{folder}: no such folder; run the stage that writes it first')
    path = Path(folder) / 'gates.json'
    problem = ''
    if not path.exists():
        problem = 'has no gates.json: its stage did not finish'
    else:
        verdicts, passed = read_verdict(path)
        failed = [gate.name for gate in verdicts if not gate.passed]
        if failed:
            problem = f'failed its gate "{failed[0]}"'
            if len(failed) > 1:
                problem += f' and {len(failed) - 1} more'
        elif not passed:                               # all of no gates
            problem = 'failed: no gate was measured'
    if problem and not allow_failed_gates:
        raise SystemExit(f'{folder} {problem}; fix it, or set allow_failed_gates = True to go on all the same')


def verdict_files(folder):
    """The gates.json of a folder and of those in it."""
    paths = [Path(folder) / 'gates.json', *sorted(Path(folder).glob('*/gates.json'))]
    return [path for path in paths if path.exists()]


def number(value):
    """A number of gates.json, which has null where one is not finite."""
    return math.nan if value is None else float(value)


def read_verdict(path):
    """([Gate], passed) of a gates.json; a damaged one is a gate that failed."""
    try:
        record = json.loads(path.read_text())
        verdicts = []
        for gate in record['gates']:
            verdicts.append(Gate(str(gate['name']), number(gate['value']), str(gate['bar']), bool(gate['passed'])))
        return verdicts, bool(record['passed'])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        return [Gate(f'{path.name} is whole', math.nan, f'not damaged ({type(e).__name__}: {e})', False)], False


def read_worth(path):
    """{task: of worth()} of a gates.json; {} where there is none, or a damaged one."""
    try:
        rows = json.loads(path.read_text()).get('worth', {})
        return {str(task): {column: number(row[column]) for column in WORTH} for task, row in rows.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def report_card(folder):
    """Print the gates of every stage found in a folder; True when there are some and all passed."""
    paths = verdict_files(folder)
    if not paths:
        raise SystemExit(f'{folder}: no gates.json here or one level below; run a stage first')
    rows = {}
    for path in paths:
        for task, measured in read_worth(path).items():
            rows[f'{path.parent} {task}'.strip()] = measured
    if rows:
        print(f'{worth_table(rows)}\n')
    all_passed = True
    for path in paths:
        verdicts, passed = read_verdict(path)
        all_passed = all_passed and passed
        print(f'{path.parent}\n{table(verdicts)}\n')
    return all_passed


def curves(log, png, conditions=('noise', 'zero', 'shuffled', 'correct'), tasks=('',)):
    """Draw a training log: the loss, that on held-out items under each condition, and for each task how often the right
    input and output are found by their likelihood."""
    records = [json.loads(line) for line in Path(log).read_text().splitlines()]
    steps = [record for record in records if record['kind'] == 'step']
    evals = [record for record in records if record['kind'] == 'eval']
    figure = new_figure(15, 4)
    left, middle, right = figure.subplots(1, 3)
    left.plot([record['step'] for record in steps], [record['window_loss'] for record in steps])
    left.set(title='training loss', xlabel='step', ylabel='nats per label')

    def plot(axes, key, label):
        axes.plot([record['step'] for record in evals], [record[key] for record in evals], 'o-', label=label)

    for condition in conditions:
        plot(middle, condition, condition)
    middle.set(title='held-out loss', xlabel='step')
    for task in tasks:
        prefix = f'{task}_' if task else ''
        for what in 'input', 'output':
            plot(right, f'{prefix}{what}_recall_1', f'{task} {what}'.strip())
    right.set(title='found in its set, recall@1', xlabel='step', ylim=(-0.03, 1.03))
    for axes in middle, right:
        axes.legend()
    content = io.BytesIO()
    figure.savefig(content, dpi=110)                   # a PNG
    write_atomic(png, content.getvalue())


if __name__ == '__main__':
    if len(sys.argv) != 2 or sys.argv[1].startswith('-'):
        raise SystemExit(__doc__.strip())
    folder = Path(sys.argv[1])
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    try:
        passed = report_card(folder)
    finally:                                           # the page shows also what is not judged yet
        if folder.is_dir():
            runpy.run_module('tools.report', run_name='__main__')   # it reads the same sys.argv
    sys.exit(0 if passed else 1)
