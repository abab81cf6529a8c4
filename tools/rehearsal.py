"""
A rehearsal of the real run: the whole chain from the real config files, at the real widths, on whatever machine.

Base models and codecs have the classes and widths of the real ones, few layers and random weights; the data is made up,
in the real formats. What is in the configs stays as it is but for counts: of steps, examples and held-out items. Random
weights learn nothing, so the bars of what has to be learned are opened; the exact gates have to pass.

reads   configs/*_qwen3_SIZE.py
writes  root/{world.json,configs/,data/,out/,<base models>,logs/,table.md}
done    when every stage has come to its last gate; exits 1 when one crashed or failed an exact gate

$ python -m tools.rehearsal
$ python -m tools.rehearsal --size=8b --examples_per_step=0 --nproc_per_node=8 --side_by_side=False
"""
import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers import Qwen3Config, SiglipVisionConfig

import gates
from common import provenance, write_atomic
from configure import configure
from tools import timed
from tools.check import read_settings
from tools.memory import KNOWN, Step, Trained, memory_needed
from tools.real_shapes import known_shapes, make_all
from uti import TokenSpace

REPO = Path(__file__).resolve().parent.parent
SCRIPTS = {'a1': 'train_a1.py', 'a11': 'sweep_a11.py', 'a2': 'train_a2.py', 'b1': 'uti.py', 'b2': 'build_b2.py',
           'b3': 'train_b3.py', 'b4': 'train_b4.py', 'sample': 'sample.py', 'export': 'sample.py'}
TRAINING = ('a1', 'a2', 'b3', 'b4')
TRACKS = (('a1', 'a2', 'a11'), ('b1', 'b2', 'b3', 'b4'))
AT_THE_END = ('sample', 'export')
ALONE = ('a11', 'b1', 'sample', 'export')            # one process, however many ranks the others take
DATA_SIZE = {'a1': 558_128, 'a2': 157_712}             # samples of what the real configs name
# no setting opens these, and random weights, or a few items, need not pass them
MAY_FAIL = ('zeros cost more than another image', 'items measured')
# bars of what has to be learned, opened
AT_LEAST = ('share_removed input_recall output_recall ablation_nats win distinct own_truth psnr ssim si_snr '
            'shuffled_nats shuffled_win random_nats random_win prompt_nats prompt_win empty_nats empty_win pixel_std '
            'rms spectral_std').split()
AT_MOST = 'commonest malformed log_mel read_points text'.split()


# -----------------------------------------------------------------------------
# what runs


def open_bars(stage, settings):
    opened = {f'gate_{name}': -1e9 for name in AT_LEAST} | {f'gate_{name}': 1e9 for name in AT_MOST}
    if stage == 'b3':
        del opened['gate_text']                        # exact: the text probabilities stay what they are
    return {name: bar for name, bar in opened.items() if name in settings}


def counts(stage, settings):
    """{setting: value} of a stage: fewer steps, examples and items than its config has."""
    changed = {'n_eval': n_held_out, 'n_golden': 2, 'n_predictions': n_held_out, 'n_retrieval': n_held_out, 'n_text': 8,
               'max_new_tokens': 8, 'log_every': 1, 'gate_items': n_held_out, 'n_items': n_held_out, 'n_alone': 1,
               'n_shown': 2, 'n_checked': 2}
    if stage in TRAINING:
        per_step = examples_per_step or settings['global_batch_size']
        changed['epoch_samples'] = steps * per_step
        if stage != 'a1':                              # which measures its time and chooses, as all would
            changed['eval_every'] = steps
        if examples_per_step:
            changed |= {'global_batch_size': per_step, 'micro_batch_size': min(4, per_step)}
    if stage == 'b2':
        changed |= {'shard_media': 16, 'batch_size': 8}
    return {name: value for name, value in changed.items() if name in settings}


def flags_of(changed):
    return [f'--{name}={value}' for name, value in changed.items()]


def commands(stage):
    """[arguments of its script] of each run of a stage, from inside root."""
    out = f'out/{{}}_qwen3_{size}'
    pictures = 'data/LLaVA-Pretrain/images/00000'
    if stage == 'sample':
        picture = f'{pictures}/000000000.jpg'
        sound = 'data/Clotho/development/a sound 0.wav'
        short = '--max_new_tokens=8'
        return [[out.format('a1'), '--image', picture, short],
                [out.format('a2'), '--image', picture, '--prompt', 'What is in this picture?', short],
                [out.format('b4'), '--image', picture, '--audio', sound, '--draw', 'a red car', '--sound', 'a dog',
                 short]]
    if stage == 'export':
        return [[out.format(run), '--export', f'out/{run}_export'] for run in ('a2', 'b4')]
    config = f'configs/{stage}_qwen3_{size}.py'
    if stage == 'a11':
        settings, _ = read_settings('a1', REPO / f'configs/a1_qwen3_{size}.py')
        sweep, _ = read_settings('a11', REPO / config)
        overrides = {**sweep['overrides'], **open_bars('a1', settings), **counts('a1', settings)}
        return [[config, f'--overrides={overrides}', "--grid={'vision_ln': [False, True]}"]]
    settings, _ = read_settings(stage, REPO / config)
    changed = {**open_bars(stage, settings), **counts(stage, settings)}
    if 'allow_failed_gates' in settings:
        changed['allow_failed_gates'] = True
    return [[config, *flags_of(changed)]]


def run_stage(stage):
    """What went wrong, or ''. What tools/timed.py notes of it is in logs/."""
    for n, arguments in enumerate(prepared[stage]):
        log = Path(root) / 'logs' / f'{stage}{n or ""}.txt'
        log.parent.mkdir(exist_ok=True)
        path = log.with_suffix('.json').resolve()
        ranks = 1 if stage in ALONE else nproc_per_node
        status = timed.start(path, REPO / SCRIPTS[stage], arguments, folder=root, log=log, ranks=ranks)
        if problem := problem_of(stage, status, log):
            path.unlink(missing_ok=True)
            return problem
    return ''


def run_stages(chosen):
    """Run them one after the other; a line for each that did not come to its last gate."""
    problems = []
    for stage in chosen:
        start = time.time()
        shutil.rmtree(Path(root) / 'out' / f'{stage}_qwen3_{size}', ignore_errors=True)
        if stage == 'export':
            for path in Path(root).glob('out/*_export'):
                shutil.rmtree(path)
        problem = run_stage(stage)
        print(f'{stage}: {problem or "to its last gate"}; {time.time() - start:.0f} s', flush=True)
        if problem:
            problems.append(f'{stage}: {problem}')
    return problems


def rows_so_far():
    """The lines of the stages that have come to their end, in this start or an earlier one."""
    rows = []
    for stage in SCRIPTS:
        noted = [json.loads(path.read_text()) for path in sorted(Path(root).glob(f'logs/{stage}.json'))]
        noted += [json.loads(path.read_text()) for path in sorted(Path(root).glob(f'logs/{stage}[0-9].json'))
                  if stage in ('sample', 'export')]
        if noted:
            rows.append(row_of(stage, noted))
    return rows


def problem_of(stage, status, log):
    """Why a stage did not come to its last gate, or which exact gate failed; '' when nothing is wrong."""
    lines = log.read_text().strip().splitlines() or ['']
    verdicts = sorted((Path(root) / 'out' / f'{stage}_qwen3_{size}').glob('**/gates.json'))
    if status != 0 and (not verdicts or status != 1):
        return f'exit status {status}: {lines[-1]}'
    for path in verdicts:
        judged, _ = gates.read_verdict(path)
        failed = [gate.name for gate in judged if not gate.passed and not gate.name.endswith(MAY_FAIL)]
        if failed:
            return f'{path}: failed {"; ".join(failed)}'
    if stage == 'a11':
        found = Path(root).glob(f'out/a11_qwen3_{size}/*/status.json')
        states = [json.loads(path.read_text())['state'] for path in found]
        if states != ['finished'] * 2:
            return f'its runs are {states}: {lines[-1]}'
    return ''


# -----------------------------------------------------------------------------
# what it says about the real run


def work_of(stage, settings, micro_batch, n_layers, n_tower_layers):
    """Multiplications of an example's step, twice over: forward, and backward to what learns; without attention."""
    shape, tower = known_shapes(llm)
    d = shape['hidden_size']
    inside = shape['num_attention_heads'] * shape['head_dim']
    layer = 2 * d * inside + 2 * d * shape['num_key_value_heads'] * shape['head_dim']
    layer += 3 * d * shape['intermediate_size']
    n = micro_batch['examples']
    work = 4 * n_layers * layer * micro_batch['tokens'] / n
    work += 4 * d * (micro_batch['labels'] * shape['vocab_size'] + micro_batch['codes'] * 16_384) / n
    if stage in ('a1', 'a2'):
        v = tower['hidden_size']
        patches = (tower['image_size'] // tower['patch_size']) ** 2
        work += 2 * n_tower_layers * (4 * v * v + 2 * v * tower['intermediate_size']) * patches
    return work


def memory_by_formula(stage, settings, micro_batch, device):
    """MB of a step, and of the codecs, which the formula leaves out."""
    llm_shape, tower_shape = known_shapes(llm)
    n = micro_batch['examples']
    is_half = settings['dtype'] == 'bfloat16' or 'bfloat16' in str(dtype_here(device))
    step = Step(n, micro_batch['tokens'] // n, labels=micro_batch['labels'] // n, codes=micro_batch['codes'] // n,
                code_range=16_384, half=is_half, cuda=device == 'cuda', ranks=nproc_per_node)
    trained = {'lora_r': settings.get('lora_r', 16), 'lora_dropout': settings.get('lora_dropout', 0.0)}
    codecs = 0
    if stage in ('b3', 'b4'):
        trained['new_rows'] = TokenSpace.load(Path(root) / f'out/b1_qwen3_{size}/token_space.json').n_new
        codecs = sum(path.stat().st_size for name in ('deepseek-community', 'kyutai')
                     for path in (Path(root) / name).glob('*/*.safetensors'))
    need = memory_needed(stage, Qwen3Config(**{**llm_shape, 'num_hidden_layers': layers}),
                         SiglipVisionConfig(**{**tower_shape, 'num_hidden_layers': layers}), step, Trained(**trained))
    return (need['peak'] + codecs) / 2**20


def dtype_here(device):
    import torch

    from common import frozen_dtype
    return frozen_dtype('auto', torch.device(device))


def row_of(stage, noted):
    """The cells of a stage's line. noted: by tools/timed.py, of each run of the stage."""
    times = noted[0]
    seconds = times['seconds']
    total = f'{sum(run["seconds"]["total"] for run in noted):.0f}'
    if not times['n_steps']:
        return [stage.upper(), *[''] * 6, total]
    phases = [f'{seconds[name]:.1f}' for name in ('start', 'data', 'step', 'evaluation', 'checkpoint', 'rest')]
    cells = [stage.upper(), *phases, total]
    settings, _ = read_settings(stage, REPO / f'configs/{stage}_qwen3_{size}.py')
    micro_batch = times['micro_batch']
    peak = times['memory_mb']['steps'] - times['memory_mb']['before']
    cells += [f'{peak}', f'{memory_by_formula(stage, settings, micro_batch, times["device"]):.0f}']
    n_examples = steps * (examples_per_step or settings['global_batch_size'])
    shape, tower = known_shapes(llm)
    deep = work_of(stage, settings, micro_batch, shape['num_hidden_layers'], tower['num_hidden_layers'])
    thin = work_of(stage, settings, micro_batch, layers, layers)
    each = (seconds['step'] + seconds['data']) / n_examples * deep / thin
    an_epoch = 60 * settings['epoch_minutes'] / each
    once = f'{DATA_SIZE[stage] * each / 3600:,.0f}' if stage in DATA_SIZE else ''
    return [*cells, f'{each:.3g}', f'{an_epoch:,.0f}', once]


HEAD = ['stage', 'start', 'data', 'step', 'evaluation', 'checkpoint', 'rest', 'all', 'peak MB', 'formula MB',
        'full depth: s an example', 'examples in `epoch_minutes`', 'h for all of its data']


def table(rows):
    lines = [HEAD, ['---'] * len(HEAD), *rows]
    return '\n'.join('| ' + ' | '.join([*line, *[''] * (len(HEAD) - len(line))]) + ' |' for line in lines)


if __name__ == '__main__':
    # -----------------------------------------------------------------------------
    # settings; override any with --key=value
    size = '0.6b'                  # whose configs: configs/*_qwen3_0.6b.py or 8b
    root = 'out/rehearsal'         # everything is made in this folder
    stages = ('a1', 'a11', 'a2', 'b1', 'b2', 'b3', 'b4', 'sample', 'export')   # a later start may run some of them anew
    layers = 2                     # of the language model and of the tower; the time at full depth is computed
    steps = 3                      # of each training stage
    examples_per_step = 8          # 0 for the configs' own global_batch_size and micro_batch_size: a GPU can
    n_held_out = 8                 # items to evaluate on: 8 are the fewest that gates take
    n_pictures = 32
    n_sounds = 16
    tokenizer = ''                 # folder or name of Qwen3's own; '' for a stand-in with as many ids
    side_by_side = True            # tracks A and B at once: half the time on two cores; False where they share a GPU
    nproc_per_node = 1             # GPUs, or processes of a CPU, of each stage that takes several
    config = configure(globals())
    # -----------------------------------------------------------------------------
    llm = {name.split('-')[-1].lower(): name for name in KNOWN if 'Qwen3' in name}.get(size)
    if llm is None or set(stages) - set(SCRIPTS):
        raise SystemExit(f'size = {size!r}, stages = {stages}: wanted 0.6b or 8b, and some of {", ".join(SCRIPTS)}')
    world = {name: config[name] for name in ('size', 'layers', 'n_pictures', 'n_sounds', 'tokenizer')}
    made = Path(root) / 'world.json'
    start = time.time()
    if not made.exists() or json.loads(made.read_text()) != world:
        if Path(root).exists() and not made.exists() and any(Path(root).iterdir()):
            raise SystemExit(f'{root} is there and not of an earlier rehearsal: name another folder')
        shutil.rmtree(root, ignore_errors=True)
        make_all(root, llm, *known_shapes(llm), n_layers=layers, n_pictures=n_pictures, n_sounds=n_sounds,
                 tokenizer=tokenizer)
        write_atomic(made, json.dumps(world))
        print(f'made base models, codecs and data in {time.time() - start:.0f} s: random weights, real widths')
    prepared = {stage: commands(stage) for stage in stages}    # not side by side: configs are read as by a script alone
    chosen = [[stage for stage in track if stage in stages] for track in TRACKS]
    if side_by_side and all(chosen):
        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(run_stages, chosen))
    else:
        found = [run_stages(track) for track in chosen]
    found.append(run_stages([stage for stage in AT_THE_END if stage in stages]))
    problems = [line for lines in found for line in lines]
    here = provenance()
    text = (f'{table(rows_so_far())}\n\n{layers} of the layers of {llm} and of the tower; seconds, on a CPU those of '
            f'its cores. Computed, not measured: the formula of tools/memory.py, and what is right of it, the time of '
            f'a step by its multiplications at full depth.\n{here["device"]}, torch {here["torch"]}, commit '
            f'{here["commit"]}, {here["date"]}.')
    write_atomic(Path(root) / 'table.md', text + '\n')
    print(f'\n{text}')
    for line in problems:
        print(line)
    sys.exit(1 if problems else 0)
