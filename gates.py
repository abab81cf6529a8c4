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
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import write_atomic


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


def ablation(name, better, worse, counts, bar=0.0, min_win=0.0, n_bootstrap=2000):
    """Is the loss `worse` above `better` by more than `bar` nats per label, with 95 % confidence over the items?

    better, worse: summed loss of each item under the two conditions; counts: labels of each item. The difference is
    token weighted, sum / count, and bootstrapped over items. Returns (Gate, {'d', 'low', 'high', 'win'}); win: share of
    items in which worse > better. Too few items (under 8) or a NaN fail.
    """
    better = np.asarray(better, dtype=np.float64)
    worse = np.asarray(worse, dtype=np.float64)
    counts = np.asarray(counts, dtype=np.float64)
    n = len(counts)
    if n == 0 or counts.sum() == 0:                    # a set that came out empty must not pass
        nothing = {'d': math.nan, 'low': math.nan, 'high': math.nan, 'win': math.nan}
        return Gate(name, math.nan, 'items to measure on', False), nothing
    difference = worse - better                        # item by item: what makes an item hard cancels out
    # the items drawn again with replacement, seeded: the same losses get the same verdict
    picks = np.random.default_rng(0).integers(n, size=(n_bootstrap, n))
    samples = difference[picks].sum(1) / np.maximum(counts[picks].sum(1), 1)                    # (n_bootstrap,)
    low, high = np.quantile(samples, [0.025, 0.975])   # the 95 % interval
    d = difference.sum() / counts.sum()
    win = (worse > better).mean()
    passed = bool(n >= 8 and low > bar and win >= min_win)   # with NaN every comparison is False
    wanted = f'95 % interval above {bar:g}'
    if n < 8:
        wanted = f'{n} items, wanted 8; {wanted}'
    if min_win:
        wanted += f', win >= {min_win:g}'
    measured = {'d': d, 'low': low, 'high': high, 'win': win}
    measured = {key: round(float(value), 5) for key, value in measured.items()}
    return Gate(name, measured['d'], f'{wanted}; [{low:.3f}, {high:.3f}], win {win:.3f}', passed), measured


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


# -----------------------------------------------------------------------------
# what a stage did


def training_gates(declared, trainable, with_gradient, before, after):
    """The gates on what was trained: declared, trainable and with_gradient are sets of names; before and after the
    sha256 of everything frozen."""
    undeclared = set(declared) ^ set(trainable)        # in one of them only
    without_gradient = set(trainable) - set(with_gradient)   # over the whole run: cut off from the loss
    return [
        exactly('parameters trained but not declared, or declared but not trained', len(undeclared), 0),
        exactly('trained parameters without a gradient', len(without_gradient), 0),
        exactly('frozen weights changed (sha256)', int(before != after), 0),
    ]


def label_gates(examples, max_truncated):
    """The gates on what a stage's examples lost: cut ones, and ones without a label."""
    truncated = [example.truncated for example in examples]
    without_label = [example for example in examples if len(example.label_positions) == 0]
    return [
        at_most('share of truncated samples', np.mean(truncated) if truncated else math.nan, max_truncated),
        exactly('samples without a label', len(without_label) if truncated else math.nan, 0),
    ]


def lora_gate(names):
    """Of all parameters' names: LoRA is in the language model's layers and nowhere else, the tower for example."""
    # targets such as q_proj are names of the tower's modules too
    outside = [name for name in names if 'lora_' in name and not name.startswith('llm.model.layers.')]
    return exactly("LoRA weights outside the language model's layers", len(outside), 0)


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
    gates = [at_least(f'{task}: distinct outputs', len(different) / max(len(codes), 1), distinct)]

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


def conclude(out_dir, gates, **measured):
    """Write out_dir/gates.json, print the verdicts, and return the exit status: 0 when all passed, else 1."""
    passed = bool(gates) and all(gate.passed for gate in gates)        # no gate at all is no pass
    record = {'passed': passed, 'gates': [gate._asdict() for gate in gates], **measured}
    write_atomic(Path(out_dir) / 'gates.json', json.dumps(record, indent=1))
    verdict = f'{len(gates)} gates passed'
    if not passed:
        failed = [gate.name for gate in gates if not gate.passed] or ['no gate was measured']
        verdict = f'FAILED at: {"; ".join(failed)}'
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


def read_verdict(path):
    """([Gate], passed) of a gates.json; a damaged one is a gate that failed."""
    try:
        record = json.loads(path.read_text())
        verdicts = []
        for gate in record['gates']:
            verdicts.append(Gate(str(gate['name']), float(gate['value']), str(gate['bar']), bool(gate['passed'])))
        return verdicts, bool(record['passed'])
    except (OSError, ValueError, KeyError, TypeError) as e:
        return [Gate(f'{path.name} is whole', math.nan, f'not damaged ({type(e).__name__}: {e})', False)], False


def report_card(folder):
    """Print the gates of every stage found in a folder; True when there are some and all passed."""
    paths = verdict_files(folder)
    if not paths:
        raise SystemExit(f'{folder}: no gates.json here or one level below; run a stage first')
    all_passed = True
    for path in paths:
        verdicts, passed = read_verdict(path)
        all_passed = all_passed and passed
        print(f'{path.parent}\n{table(verdicts)}\n')
    return all_passed


def curves(log, png, conditions=('noise', 'zero', 'shuffled', 'correct')):
    """Draw a training log: the loss, and that on held-out items under each condition."""
    from matplotlib.figure import Figure               # no pyplot: it would choose a backend, a notebook's for example
    records = [json.loads(line) for line in Path(log).read_text().splitlines()]
    steps = [record for record in records if record['kind'] == 'step']
    evals = [record for record in records if record['kind'] == 'eval']
    figure = Figure(figsize=(11, 4), layout='constrained')
    left, right = figure.subplots(1, 2)
    left.plot([record['step'] for record in steps], [record['window_loss'] for record in steps])
    left.set(title='training loss', xlabel='step', ylabel='nats per label')
    for condition in conditions:
        losses = [record[condition] for record in evals]
        right.plot([record['step'] for record in evals], losses, 'o-', label=condition)
    right.set(title='held-out loss', xlabel='step')
    right.legend()
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
