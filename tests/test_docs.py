"""What the repository says about itself is true: configs fit their scripts, commands parse, imports point down."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

SCRIPTS = {'a1': 'train_a1.py', 'a11': 'sweep_a11.py', 'a2': 'train_a2.py', 'b1': 'uti.py', 'b2': 'build_b2.py',
           'b3': 'train_b3.py', 'b4': 'train_b4.py'}
CONFIGS = sorted((REPO / 'configs').glob('*.py'))


def settings_of(script):
    """A script's settings, as its source says them: what stands above `config = configure(...)`."""
    tree, found = ast.parse((REPO / script).read_text()), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if node.targets[0].id == 'config':
                break
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                pass
    return {k: v for k, v in found.items() if k.islower()}


@pytest.mark.parametrize('script', SCRIPTS.values())
def test_a_script_without_a_config_says_what_it_wants_and_leaves_no_folder(script, tmp_path):
    done = subprocess.run([sys.executable, REPO / script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and f'is not set: give {script} a config file' in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not any(tmp_path.iterdir())


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.name)
def test_every_config_is_accepted_by_its_script(path, monkeypatch):
    from small import make as make_small
    from configure import configure
    monkeypatch.setattr(make_small, 'ensure', lambda *parts: Path('data/small'))
    script = SCRIPTS[path.stem.split('_')[0]]
    settings = configure(settings_of(script), [str(path)])
    assert settings['out_dir'].startswith('out/')
    if script == 'sweep_a11.py':
        for key, values in {**settings['grid'], **{k: [v] for k, v in settings['overrides'].items()}}.items():
            for value in values:
                configure(settings_of('train_a1.py'), [settings['base_config'], f'--{key}={value}'])


def commands():
    """Every `$ ` line of the README, the pages, the docstrings and the configs, with the file that it is in."""
    for path in [REPO / 'README.md', *sorted((REPO / 'docs').glob('*.md')), *sorted(REPO.glob('*.py')), *sorted(REPO.glob('small/*.py')), *sorted(REPO.glob('tools/*.py')), *CONFIGS]:
        for line in path.read_text().splitlines():
            match = re.match(r'\s*(?:# )?\$ (.+)', line)
            if match:
                yield path.name, re.split(r'\s{2,}#', match[1])[0].strip()


@pytest.mark.parametrize('where, command', sorted(set(commands())), ids=lambda v: re.sub(r'\W+', '-', v)[:60])
def test_every_command_that_is_shown_parses(where, command):
    """Its script exists, its configs exist or are made by a stage, and its --key=value settings are the script's."""
    words = command.split()
    if words[0] in ('make',):
        targets = re.findall(r'^([\w/-]+):', (REPO / 'Makefile').read_text(), re.MULTILINE)
        assert {w for w in words[1:] if w[0] != '-'} <= set(targets)
        return
    if words[0] not in ('python', 'torchrun'):
        assert words[0] in ('git', 'cd', 'python3', 'source', 'pip', '.venv/bin/pip', 'tar', 'unzip'), command
        return
    script, page = next(w for w in words if w.endswith('.py')), REPO / 'docs' / where
    written = re.findall(r'^`([\w./]+)`:$', page.read_text(), re.MULTILINE) if page.exists() else []   # by its reader
    assert (REPO / script).exists() or script in written
    for word in words[words.index(script) + 1:]:
        if word.endswith('.py'):
            assert (REPO / word).exists() or word.startswith('out/') or word in written, word
        elif script != 'sample.py' and (match := re.match(r'--(\w+)=', word)):
            own = ('parts', 'score', 'bar', 'bar_written', 'points_lost') if script == 'make_small.py' else ()
            assert match[1] in settings_of(script) or match[1] in own


def test_sample_shows_its_options():
    done = subprocess.run([sys.executable, 'sample.py', '--help'], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and '--prompt' in done.stdout


def test_imports_point_down():
    """Core modules import no script, scripts import no script, and nothing imports what stands above it."""
    order = ['configure', 'common', 'world', 'corpus', 'codec', 'small_codecs', 'uti', 'data', 'gates', 'report',
             'model', 'tokens', 'export', 'script']
    rank = {name: order.index(name) for name in order[:-1]}
    for path in REPO.glob('*.py'):
        mine = rank.get(path.stem, len(order) - 1)
        tree = ast.parse(path.read_text())
        if path.stem in rank:                          # as a script, a module may use what stands above it
            tree.body = [n for n in tree.body if not ast.unparse(n).startswith("if __name__ == '__main__':")]
        top = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
        for node in top:
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            for name in names:
                if (REPO / f'{name}.py').exists():
                    assert rank.get(name, len(order) - 1) < mine, f'{path.name} imports {name}'


def test_copies_that_must_stay_alike_are_alike():
    """The passages that the training scripts share to the letter; a fix to one has to reach the others."""
    a1, a2, b3, b4 = ((REPO / f'train_{stage}.py').read_text() for stage in ('a1', 'a2', 'b3', 'b4'))
    b3, b4 = (text.replace('lm(batch', 'vlm(batch') for text in (b3, b4))
    for passage, texts in (('def forward_backward.*?\n\n\n', (a1, a2, b3, b4)), ('def evaluate.*?\n\n\n', (a1, a2)),
                           ('    # stop\n.*?    # learning rate', (a1, a2, b3, b4)),
                           ('# schedule.*?# evaluate', (a1, b3)), ('def lr_at.*?\n\n\n', (a2, b4)),
                           ('    # learning rate.*?    # step', (a1, b3)),
                           ('    # learning rate.*?    # log', (a2, b4)),
                           ('    # log\n.*?# gates', (a1, b3)), ('def rows_of.*?\n\n\n', (b3, b4)),
                           ('# ranks.*?# derived', (a2, b3, b4)), ('tensorboard = .*?\n', (a1, a2, b3, b4)),
                           ('\nlog = Log.*?\n', (a1, a2, b3, b4)), ('\nout, stop, .*?\n', (a1, a2, b3, b4))):
        cut = [re.search(passage, text, re.DOTALL)[0].replace('caption(evaluation', '') for text in texts]
        assert len(set(cut)) == 1, passage
