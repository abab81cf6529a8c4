"""configure.py: what a config file and --key=value may set, what is refused and how, and what is printed about it."""
import os
import runpy
import sys
import traceback

import pytest
from conftest import REPO

from configure import configure


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                        # so that messages read a.py:1, as they do for a user
    monkeypatch.delenv('RANK', raising=False)


def script():
    """A script's globals at the moment it calls configure."""
    return {'learning_rate': 1e-3, 'batch_size': 16, 'out_dir': 'out', 'resume': False, 'bucket_edges': (10, 20),
            'stages': ['a1'], '_private': 1, 'PATCHES': 64, 'os': os}


def config(text, name='a.py'):
    with open(name, 'w') as f:
        f.write(text)
    return name


def refusal(*argv):
    """The one line that these arguments are refused with; the script's settings are then as they were."""
    namespace = script()
    with pytest.raises(SystemExit) as e:
        configure(namespace, list(argv))
    assert namespace == script() and '\n' not in e.value.code
    return e.value.code


# -----------------------------------------------------------------------------
# what may be set


@pytest.mark.parametrize('argument, key, value', [
    ('--learning_rate=-2e-4', 'learning_rate', -0.0002), ('--resume=True', 'resume', True),
    ('--bucket_edges=5,-7', 'bucket_edges', (5, -7)), ('--bucket_edges=[1, 2, 3]', 'bucket_edges', (1, 2, 3)),
    ('--out_dir=out/b 3', 'out_dir', 'out/b 3'), ('--out_dir=3', 'out_dir', '3'), ('--out_dir=', 'out_dir', ''),
    ('--out_dir=x.py', 'out_dir', 'x.py'), ("--stages=['b3']", 'stages', ['b3'])])
def test_key_value_takes_literals_and_leaves_strings_alone(argument, key, value):
    namespace = script()
    settings = configure(namespace, [argument])
    assert settings[key] == value and namespace == {**script(), key: value}
    assert settings == {k: v for k, v in namespace.items() if k not in ('_private', 'PATCHES', 'os')}


def test_an_int_for_a_float_becomes_a_float():
    assert type(configure(script(), ['--learning_rate=2'])['learning_rate']) is float


def test_the_later_argument_wins_whichever_kind_it_is():
    path = config('batch_size = 1\n')
    assert configure(script(), [path, '--batch_size=3'])['batch_size'] == 3
    assert configure(script(), ['--batch_size=3', path])['batch_size'] == 1
    assert configure(script(), [path, config('batch_size = 2\n', 'b.py')])['batch_size'] == 2


def test_a_config_computes_from_earlier_settings_imports_from_the_repository_and_calls(monkeypatch):
    monkeypatch.setattr(sys, 'path', [p for p in sys.path if p != str(REPO)])
    monkeypatch.delitem(sys.modules, 'gates', raising=False)
    path = config('import math\nfrom os import path as p\nimport gates\n_half = batch_size // 2\n'
                  'def double(x):\n    y = 2 * x\n    return y\nclass Thing:\n    size = 3\n_triple = lambda x: 3 * x\n'
                  'batch_size = double(_half) + _triple(Thing.size)\nlearning_rate = math.sqrt(4)\n'
                  'out_dir = p.join(*[part for part in ("a", "b")])\nresume = gates.at_most("", 1, 2).passed\n')
    namespace = script()
    before = list(sys.path)
    configure(namespace, ['--batch_size=8', path])
    assert namespace == {**script(), 'batch_size': 17, 'learning_rate': 2.0, 'out_dir': 'a/b', 'resume': True}
    assert sys.path == before


@pytest.mark.parametrize('text', ['from base_of_test import *', 'exec(open("base_of_test.py").read())',
                                  'globals().update(batch_size=4)'])
def test_a_setting_that_comes_in_by_another_way_than_an_assignment_counts(text, monkeypatch):
    monkeypatch.syspath_prepend('.')
    monkeypatch.delitem(sys.modules, 'base_of_test', raising=False)
    config('batch_size = 4\n', 'base_of_test.py')
    assert configure(script(), [config(text + '\n')])['batch_size'] == 4


def test_names_with_an_underscore_are_a_configs_own():
    path = config('_helper = 3\nfor _i in range(3):\n    batch_size = _i\n_private = 7\n')
    assert configure(script(), [path]) == configure(script(), ['--batch_size=2'])


# -----------------------------------------------------------------------------
# what is refused


def test_a_typo_names_file_line_and_nearest_name():
    assert refusal(config('batch_size = 8\nlearning_rat = 0.1\n')) == (
        "a.py:2: no setting is called 'learning_rat', did you mean 'learning_rate'?")
    assert refusal('--batchsize=8') == "--batchsize: no setting is called 'batchsize', did you mean 'batch_size'?"
    assert "did you mean 'learning_rate'?" in refusal('--learning-rate=1')


@pytest.mark.parametrize('text, found', [
    ('batch_size = 1.5', 'batch_size = 1.5 is float, wanted int like 16'),
    ('batch_size = True', 'batch_size = True is bool, wanted int like 16'),
    ('learning_rate = True', 'learning_rate = True is bool, wanted float like 0.001'),
    ('resume = 1', 'resume = 1 is int, wanted bool like False'),
    ('out_dir = 3', "out_dir = 3 is int, wanted str like 'out'"),
    ('bucket_edges = 10', 'bucket_edges = 10 is int, wanted tuple like (10, 20)')])
def test_another_type_is_refused_in_a_file_and_on_the_command_line(text, found):
    assert refusal(config(f'\n{text}\n')) == f'a.py:2: {found}'
    if not text.startswith('out_dir'):                 # --out_dir=3 is the string '3'
        key = text.split()[0]
        assert refusal('--' + text.replace(' ', '')) == f'--{key}: {found}'


@pytest.mark.parametrize('text, name', [('for i in range(3):\n    pass', 'i'), ('helper = 3', 'helper')])
def test_a_loop_variable_or_helper_of_a_config_needs_an_underscore(text, name):
    line = refusal(config(f'{text}\n'))
    assert line.startswith(f'a.py:1: no setting is called {name!r}') and f"'_{name}'" in line


@pytest.mark.parametrize('typo', ['batch_sise = 3', 'batch_size = batch_sise = 3', 'for i in ():\n    pass'])
def test_a_typo_is_met_before_the_config_runs(typo):
    path = config(f'open("ran", "w")\n{typo}\n')
    assert refusal(path).startswith('a.py:2: no setting is called')
    assert not os.path.exists('ran')


@pytest.mark.parametrize('argument', ['--batch_sise=3', '--batch_size=three', '--batch_size', 'batch_size=3'])
def test_a_wrong_argument_is_met_before_the_config_before_it_runs(argument):
    refusal(config('open("ran", "w")\n'), argument)
    assert not os.path.exists('ran')


@pytest.mark.parametrize('value', ['str', 'lambda: "out/b"', 'math'])
def test_a_setting_is_never_silently_a_function_a_type_or_a_module(value):
    assert refusal(config(f'import math\nout_dir = {value}\n')).startswith('a.py:2: out_dir = ')


def test_files_that_cannot_be_run_are_refused_in_one_line():
    assert refusal(config('batch_size = 8\nlearning_rate = = 2\n')) == 'a.py:2: not valid Python: invalid syntax'
    assert refusal('gone.py') == 'gone.py: cannot read this config file (No such file or directory); is the path right?'
    with open('a.py', 'wb') as f:
        f.write('batch_size = 8\nout_dir = "caf\xe9"\n'.encode('latin-1'))
    assert refusal('a.py').startswith('a.py:2: not valid Python: ')


def test_an_exception_in_a_config_keeps_its_traceback_to_the_line_and_sets_nothing():
    namespace = script()
    before = list(sys.path)
    with pytest.raises(ZeroDivisionError) as e:
        configure(namespace, [config('batch_size = 8\nlearning_rate = 1 / 0\n')])
    last = traceback.extract_tb(e.value.__traceback__)[-1]
    assert (last.filename, last.lineno) == ('a.py', 2) and namespace == script() and sys.path == before


@pytest.mark.parametrize('argument', ['stray', '--resume', '-x', '--=3', '--3=3', '_private=2', ''])
def test_a_stray_argument_is_refused(argument):
    assert refusal(argument) == f'{argument}: found neither a config file (*.py) nor --key=value; see --help'


@pytest.mark.parametrize('name', ['os', 'PATCHES'])
def test_names_that_are_not_settings_cannot_be_set(name):
    assert refusal(f'--{name}=3').startswith(f"--{name}: no setting is called '{name}'")


def test_a_required_setting_that_stayed_empty_is_named_with_what_to_do():
    namespace = {**script(), 'out_dir': '', '__file__': '/somewhere/train_x.py'}
    with pytest.raises(SystemExit) as e:
        configure(namespace, ['--batch_size=3'], required=('learning_rate', 'out_dir'))
    assert e.value.code == ('out_dir is not set: give train_x.py a config file (see configs/) or --out_dir=...; --help '
                            'prints the settings')
    assert configure(script(), ['--batch_size=3'], required=('learning_rate', 'out_dir'))['batch_size'] == 3


# -----------------------------------------------------------------------------
# what is printed


def test_what_was_changed_is_printed_with_where_from_and_only_that(capsys):
    configure(script(), [config('batch_size = 8\n\nout_dir = "out"\nstages.append("a2")\n'), '--learning_rate=0.5'])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        'batch_size = 8 # a.py:1, default 16'.split(), "stages = ['a1', 'a2'] # a.py:1, default ['a1']".split(),
        'learning_rate = 0.5 # --learning_rate, default 0.001'.split()]


def test_only_rank_0_prints(capsys, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    assert configure(script(), ['--batch_size=8'])['batch_size'] == 8 and capsys.readouterr().out == ''


@pytest.mark.parametrize('text, line', [('if 1:\n    batch_size = 4\nbatch_size = 8\n', 3),
                                        ('batch_size = 8\ndef f():\n    batch_size = 3\n', 1)])
def test_the_line_printed_is_that_of_the_last_assignment_outside_functions(text, line, capsys):
    configure(script(), [config(text)])
    assert f'# a.py:{line}, default 16' in capsys.readouterr().out


def test_help_prints_the_docstring_and_the_settings_with_their_comments_and_exits_0(capsys, monkeypatch):
    path = config('"""\nStage Z: does nothing.\n"""\nfrom configure import configure\n\n_hidden = 1\n'
                  'batch_size = 16            # per rank\nout_dir = "out"\n'
                  'config = configure(globals())\nlater = 3\n')
    monkeypatch.setattr(sys, 'argv', [path, '--batch_size=nonsense', '--help'])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(path)
    assert e.value.code == 0
    assert capsys.readouterr().out == ('Stage Z: does nothing.\n\nsettings:\n'
                                       '  batch_size = 16            # per rank\n  out_dir = "out"\n')


def test_a_script_gets_its_settings_from_the_command_line_by_itself(monkeypatch, capsys):
    path = config('from configure import configure\nbatch_size = 16\nconfig = configure(globals())\nbatch_size += 1\n')
    monkeypatch.setattr(sys, 'argv', [path, '--batch_size=8'])
    result = runpy.run_path(path)
    assert result['batch_size'] == 9 and result['config'] == {'batch_size': 8}
