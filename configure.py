"""
Settings: the bare globals at the top of a script, overridden in order by config files and --key=value.

    config = configure(globals(), required=('data_json', 'llm'))

A setting is a lower-case global that holds a literal; CAPITALS, functions, classes and _names are not settings. A
config file is Python, run on a scratch copy of the settings: it may compute, import and call. Only names that the
script has can be set, and the type must stay the same (an int will do for a float). Config files are code: run only
your own.
"""
import ast
import copy
import difflib
import os
import re
import sys
from pathlib import Path

TYPES = (bool, int, float, str, tuple, list, dict, type(None))


def configure(namespace, argv=None, required=()):
    """Override the settings in `namespace` (a script's globals()) from the command line; returns them as a dict.

    argv: config files (*.py) and --key=value, later ones win; sys.argv[1:] by default. --help prints the settings and
    exits. required: settings that must not stay ''. Raises SystemExit with one line, `configs/a1.py:2: no setting is
    called ...`, for a wrong name, type or file.
    """
    argv = sys.argv[1:] if argv is None else argv
    settings = {k: v for k, v in namespace.items() if k.islower() and k[0] != '_' and isinstance(v, TYPES)}
    defaults, origin = dict(settings), {}
    if {'--help', '-h'} & set(argv):
        print_help(namespace, settings)
        raise SystemExit(0)
    flags = {arg: flag(arg, settings) for arg in argv if arg.startswith('--') or not arg.endswith('.py')}
    for arg in argv:                                   # checked above: a config file may run for minutes
        if arg in flags:
            key, value = flags[arg]
            new, where = {key: value}, {key: f'--{key}'}
        else:
            new, lines = run_config(arg, settings)
            where = {key: f'{arg}:{lines.get(key, 1)}' for key in new}
        for key, value in new.items():
            settings[key] = checked(key, value, settings, where[key])
            origin[key] = where[key]
    if missing := [key for key in required if settings[key] == '']:
        script = Path(namespace.get('__file__', 'this script')).name
        raise SystemExit(f'{missing[0]} is not set: give {script} a config file (see configs/) or --{missing[0]}=...; '
                         '--help prints the settings')
    namespace.update(settings)
    for key in origin:
        if settings[key] != defaults[key] and os.environ.get('RANK', '0') == '0':
            print(f'{key} = {settings[key]!r:<24} # {origin[key]}, default {defaults[key]!r}')
    return settings


def run_config(path, settings):
    """Names that a config file sets, with their values, and the line of each one's last assignment."""
    try:
        source = Path(path).read_bytes()             # the parser decodes: what is not UTF-8 is a SyntaxError
    except OSError as e:
        raise SystemExit(f'{path}: cannot read this config file ({e.strerror}); is the path right?')
    try:
        tree = ast.parse(source, path)
    except SyntaxError as e:
        raise SystemExit(f'{path}:{e.lineno}: not valid Python: {e.msg}')
    lines = {n.id: n.lineno for n in top_level(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for name in lines:
        if not name.startswith('_'):
            known(name, settings, f'{path}:{lines[name]}')
    scratch = dict(copy.deepcopy(settings), __file__=path, __name__='config')
    path_before = list(sys.path)
    sys.path.insert(0, str(Path(__file__).resolve().parent))   # `from small.make import ensure` works from any folder
    try:
        exec(compile(tree, path, 'exec'), scratch)
    finally:
        sys.path[:] = path_before
    # a setting counts however it changed: assigned, from base import *, appended to
    return {k: v for k, v in scratch.items() if k in settings and (k in lines or v != settings[k])}, lines


def top_level(node):
    """The nodes below this one in source order, without the bodies of functions, classes and comprehensions."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.comprehension)):
            yield from top_level(child)


def flag(arg, settings):
    """(key, value) of --key=text: a Python literal, or the text itself where the setting is a string."""
    match = re.fullmatch(r'--([A-Za-z][\w-]*)=(.*)', arg, re.DOTALL)
    if not match:
        raise SystemExit(f'{arg}: found neither a config file (*.py) nor --key=value; see --help')
    key, value = match.groups()
    known(key, settings, f'--{key}')
    if not isinstance(settings[key], str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass                                       # checked() says what it is and what was wanted
    return key, checked(key, value, settings, f'--{key}')


def known(key, settings, where):
    if key not in settings:
        near = difflib.get_close_matches(key, settings, 1)
        raise SystemExit(f'{where}: no setting is called {key!r}' + (
            f', did you mean {near[0]!r}?' if near else
            f"; is this a config for another script? See --help, and call a config's own names like {'_' + key!r}"))


def checked(key, value, settings, where):
    """The value as the setting's type, an int as a float where one is wanted, or one line."""
    wanted = type(settings[key])
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is tuple and type(value) is list:
        return tuple(value)
    if type(value) is not wanted:
        raise SystemExit(f'{where}: {key} = {value!r} is {type(value).__name__}, wanted {wanted.__name__} '
                         f'like {settings[key]!r}')
    return value


def print_help(namespace, settings):
    """The docstring, then each setting as its line in the source says it, comment and all."""
    print((namespace.get('__doc__') or '').strip() + '\n\nsettings:')
    source = Path(namespace['__file__']).read_text()
    for line in source.split("\nif __name__ == '__main__':\n")[-1].splitlines():   # a module that is also a script
        match = re.match(r'\s*([A-Za-z]\w*) = ', line)
        if match and match[1] in settings:
            print('  ' + line.strip())
        if re.search(r'\bconfigure\(globals\(\)', line):
            break
