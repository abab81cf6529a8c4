"""What the repository says about itself is true: configs fit their scripts, commands parse, imports point one way."""
import ast
import re
import runpy
import shlex
import sys

import pytest
from conftest import REPO, run_here

from configure import configure

# -----------------------------------------------------------------------------
# settings, configs and commands

SCRIPTS = {'a1': 'train_a1.py', 'a11': 'sweep_a11.py', 'a2': 'train_a2.py', 'b1': 'uti.py', 'b2': 'build_b2.py',
           'b3': 'train_b3.py', 'b4': 'train_b4.py'}
CONFIGS = sorted((REPO / 'configs').glob('*.py'))
FOLDERS = 'small', 'emoji', 'tools'
SOURCES = [path for folder in ('.', *FOLDERS) for path in sorted(REPO.glob(f'{folder}/*.py'))]
PAGES = [REPO / 'README.md', *sorted(REPO.glob('docs/*.md')), *SOURCES, *CONFIGS]


def settings_of(script):
    """A script's settings with their defaults: what stands above `config = configure(...)`, run as the script."""
    above, _ = re.split(r'^ *config = configure\(globals\(\)', (REPO / script).read_text(), flags=re.MULTILINE)
    namespace = {'__name__': '__main__', '__file__': str(REPO / script)}
    exec(compile(above, script, 'exec'), namespace)
    return configure(namespace, [])


@pytest.mark.parametrize('script', SCRIPTS.values())
def test_a_script_without_a_config_says_what_it_wants_and_leaves_no_folder(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', [script])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(REPO / script), run_name='__main__')
    assert f'is not set: give {script} a config file' in e.value.code and '\n' not in e.value.code
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('script', SCRIPTS.values())
def test_the_help_of_a_script_has_every_setting(script):
    status, printed = run_here(script, '--help')
    assert status == 0
    for name in settings_of(script):
        assert f'\n  {name} = ' in printed


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.name)
def test_every_config_is_accepted_by_its_script(path, monkeypatch):
    from small import make
    monkeypatch.setattr(make, 'ensure', lambda *parts: REPO / 'data' / 'small')
    script = SCRIPTS[path.stem.split('_')[0]]
    settings = configure(settings_of(script), [str(path)])
    assert settings['out_dir'].startswith('out/')
    if script == 'sweep_a11.py':
        for values in settings['grid'], {key: [value] for key, value in settings['overrides'].items()}:
            for key in values:
                for value in values[key]:
                    configure(settings_of('train_a1.py'), [settings['base_config'], f'--{key}={value}'])


def commands():
    """(file, command) of every `$ ` line of the README, the pages, the docstrings and the configs."""
    found = set()
    for path in PAGES:
        for line in path.read_text().splitlines():
            match = re.match(r'\s*(?:# )?\$ (.+)', line)
            if match:
                command = re.split(r'\s{2,}#', match[1])[0].strip()
                found.add((str(path.relative_to(REPO)), command))
    return sorted(found)


def files_written_by_the_reader(page):
    """A page names the files that its reader makes: `name`: and a block below it."""
    return re.findall(r'^`([\w./]+)`:$', (REPO / page).read_text(), re.MULTILINE)


def targets():
    return re.findall(r'^([\w/-]+):', (REPO / 'Makefile').read_text(), re.MULTILINE)


def check_make(words):
    assert [word for word in words if word[0] != '-' and '=' not in word and word not in targets()] == []


def check_options(script, options):
    """--key=value settings are the script's and of their type; sample.py has options of its own."""
    if script == 'sample.py':
        known = re.findall(r"add_argument\('(--\w+)'", (REPO / script).read_text())
        assert set(options) <= set(known), options
    elif options:
        configure(settings_of(script), options)


@pytest.mark.parametrize('page, command', commands(), ids=lambda value: re.sub(r'\W+', '-', value)[:60])
def test_every_command_that_is_shown_parses(page, command):
    """Its script exists, its configs exist or are made by a stage, and its --key=value settings are the script's."""
    words = shlex.split(command)
    if words[0] == 'make':
        return check_make(words[1:])
    if words[0] not in ('python', 'torchrun'):
        assert words[0] in ('git', 'cd', 'pip', 'source', 'npm'), command
        return
    written = files_written_by_the_reader(page)
    if '-m' in words:
        module = words.index('-m') + 1
        script = words[module].replace('.', '/') + '.py'
        rest = words[module + 1:]
    else:
        script = next(word for word in words if word.endswith('.py'))
        rest = words[words.index(script) + 1:]
    assert (REPO / script).exists() or script in written, script
    for word in rest:
        if word.endswith('.py'):
            assert (REPO / word).exists() or word.startswith('out/') or word in written, word
    if script not in written:
        check_options(script, [word for word in rest if word.startswith('--')])


def test_sample_shows_its_options():
    status, printed = run_here('sample.py', '--help')
    assert status == 0 and '--prompt' in printed


# -----------------------------------------------------------------------------
# imports

# a module imports from the groups above its own and from no other: so there is no circle
GROUPS = (
    ('configure', 'watch'),
    ('common',),
    ('media', 'columns'),
    ('training', 'lists', 'codec', 'sharding'),
    ('examples',),
    ('templates',),
    ('data', 'grounding'),
    ('decoders',),
    ('model',),
    ('uti',),
    ('shards',),
    ('inference', 'plan'),
    ('token_model',),
    ('gates',),
    ('small', 'small.world'),
    ('small.corpus', 'small.codecs', 'small.pairs'),
    ('small.models',),
    ('small.make',),
    ('small.score',),
    ('emoji', 'emoji.pictures'),
    ('emoji.speech', 'emoji.tower', 'emoji.score'),
    ('emoji.codecs',),
    ('tools', 'tools.bench', 'tools.check_data', 'tools.convert', 'tools.export', 'tools.many_shards', 'tools.memory',
     'tools.report', 'tools.synthetic'),
    ('tools.bench_codecs',),
    ('tools.check', 'tools.real_shapes', 'tools.timed'),
    ('tools.eval_cost', 'tools.rehearsal'),
    ('train_a1', 'sweep_a11', 'train_a2', 'build_b2', 'train_b3', 'train_b4', 'sample'),
)
USE_WHAT_STANDS_ABOVE_AS_A_SCRIPT = 'uti', 'gates'
# tools.check so that ensure() builds nothing; the tower and the codecs are made as the small world's are
OUT_OF_ITS_FOLDER = ('sample', 'tools'), ('tools.check', 'small'), ('emoji.tower', 'small'), ('emoji.codecs', 'small')


def modules_below(root):
    """{name: path} of the modules at the top and in FOLDERS."""
    modules = {}
    for path in [path for folder in ('.', *FOLDERS) for path in root.glob(f'{folder}/*.py')]:
        name = '.'.join(path.relative_to(root).with_suffix('').parts)
        modules[name.removesuffix('.__init__')] = path
    return modules


def is_main(node):
    """`if __name__ == '__main__':`"""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def imports_of(name, modules):
    """The modules among these that a module imports, in functions too."""
    tree = ast.parse(modules[name].read_text())
    if name in USE_WHAT_STANDS_ABOVE_AS_A_SCRIPT:
        tree.body = [node for node in tree.body if not is_main(node)]
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{name}: a relative import'
            imported |= {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
    return imported & modules.keys() - set(FOLDERS)   # of a folder always one of its modules is meant


def wrong_imports(root):
    """What is wrong with the imports of the modules below a folder, a line each."""
    modules = modules_below(root)
    group_of = {name: n for n, group in enumerate(GROUPS) for name in group}
    wrong = [f'{name} is in no group' for name in modules if name not in group_of]
    for name in sorted(modules.keys() & group_of.keys()):
        for other in sorted(imports_of(name, modules) & group_of.keys()):
            folder = other.split('.')[0]
            stays_inside = folder == name.split('.')[0]
            if group_of[other] >= group_of[name]:
                wrong.append(f'{name} imports {other}, which does not stand below it')
            elif folder in FOLDERS and not stays_inside and (name, folder) not in OUT_OF_ITS_FOLDER:
                wrong.append(f'{name} imports {other} out of {folder}/')
    return wrong


def test_imports_point_one_way():
    assert wrong_imports(REPO) == []


RIGHT_IMPORTS = {
    'data': 'import json\nfrom common import all_sum\nfrom media import read_image',
    'train_a1': 'import gates\nfrom training import Log',
    'sample': 'from tools.export import export_graft',
    'tools.export': 'import gates',
    'small.make': 'from small import world\nfrom small.codecs import make_image_codec\nimport model',
    'uti': 'import common\n\nif __name__ == "__main__":\n    from shards import read_manifest',
}


@pytest.mark.parametrize('name, source, complaint', [
    ('common', 'import data', 'common imports data, which'),                  # a circle, one of its two sides
    ('data', 'def f():\n    from model import VLM', 'data imports model, which'),
    ('training', 'from data import collate', 'training imports data, which'),
    ('uti', 'from shards import read_manifest', 'uti imports shards, which'),
    ('shards', 'if __name__ == "__main__":\n    import gates', 'shards imports gates, which'),
    ('model', 'from small import world', 'model imports small.world, which'),
    ('train_a1', 'from small.world import see', 'train_a1 imports small.world out of small/'),
    ('train_a1', 'import tools.export', 'train_a1 imports tools.export out of tools/'),
    ('sample', 'from small import make', 'sample imports small.make out of small/'),
    ('tools.report', 'from small import world', 'tools.report imports small.world out of small/'),
    ('train_a2', 'import train_a1', 'train_a2 imports train_a1, which'),
    ('helpers', '', 'helpers is in no group')])
def test_each_kind_of_wrong_import_is_noticed(name, source, complaint, tmp_path):
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
    tree = {module: '' for group in GROUPS for module in group} | RIGHT_IMPORTS
    for module in FOLDERS:
        tree[f'{module}.__init__'] = tree.pop(module)

    def write(name, source):
        (tmp_path / f'{name.replace(".", "/")}.py').write_text(source)
    for module, right in tree.items():
        write(module, right)
    assert wrong_imports(tmp_path) == []
    write(name, source)
    [line] = wrong_imports(tmp_path)
    assert line.startswith(complaint)


# -----------------------------------------------------------------------------
# copies

COPIES = (
    "# ranks and the run's folder\n.*?\n\n",
    'def forward_backward.*?\n\n\n',
    'def lr_at.*?\n\n\n',
    'while True:\n.*?judged again, and logged once\n',
    r'    lr = lr_at\(step\)\n.*?    progress.update\(.*?\n',
)
ONLY_IN_B3 = re.compile(r'    for name, p in trainable.items\(\):\n.*?touched.*?\n', re.DOTALL)


@pytest.mark.parametrize('passage', COPIES)
def test_copies_that_must_stay_alike_are_alike(passage):
    """What the training scripts repeat to the letter: a fix to one of them has to reach the others."""
    found = set()
    for stage in 'a1', 'a2', 'b3', 'b4':
        [copy] = re.findall(passage, (REPO / f'train_{stage}.py').read_text(), re.DOTALL)
        found.add(ONLY_IN_B3.sub('', copy))
    assert len(found) == 1
