"""tools/rehearsal.py, with tiny widths and two stages: it comes to the last gate, and says which exact gate failed."""
import contextlib

from conftest import run_here
from transformers import AutoTokenizer

from tools import real_shapes, timed

LLM = {'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 28, 'num_attention_heads': 4,
       'num_key_value_heads': 2, 'head_dim': 8, 'tie_word_embeddings': True, 'vocab_size': 3072}
TOWER = {'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 27, 'num_attention_heads': 2,
         'image_size': 56, 'patch_size': 14}


def start_here(path, script, args, *, folder, log, ranks=1):
    """timed.start in this process, which has torch already."""
    assert ranks == 1
    with open(log, 'w') as f, contextlib.redirect_stdout(f), contextlib.chdir(folder):
        try:
            timed.run(path, script, args)
        except SystemExit as e:
            print(e.code)
            return e.code if isinstance(e.code, int) else 1
    return 0


def test_it_goes_through_two_stages_and_a_failed_exact_gate_ends_it(tmp_path, monkeypatch):
    make_all = real_shapes.make_all
    tokenizer = real_shapes.make_tokenizer(n_plain_ids=3000)
    monkeypatch.setattr(real_shapes, 'make_tokenizer', lambda: tokenizer)
    monkeypatch.setattr(real_shapes, 'known_shapes', lambda llm: (LLM, TOWER))
    monkeypatch.setattr(real_shapes, 'make_all', lambda *args, **named: make_all(*args, **named, codecs=False))
    monkeypatch.setattr(timed, 'start', start_here)
    flags = [f'--root={tmp_path}/rehearsal', '--layers=1', '--n_pictures=20', '--n_sounds=1']
    code, printed = run_here('tools/rehearsal.py', *flags, '--stages=("a1",)', '--steps=2')
    assert code == 0 and '| A1 |' in printed, printed
    # after a single step half of LoRA has had no gradient: its other half begins as nothing
    code, printed = run_here('tools/rehearsal.py', *flags, '--stages=("a2",)', '--steps=1')
    assert code == 1 and 'failed trained parameters without a gradient' in printed


def test_the_stand_in_has_the_ids_of_qwen3(tmp_path):
    real_shapes.make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    known = {'<|endoftext|>': 151_643, '<|im_end|>': 151_645, '<|image_pad|>': 151_655, '<think>': 151_667}
    assert tokenizer.convert_tokens_to_ids(list(known)) == list(known.values())
    assert len(tokenizer) == 151_669
    assert tokenizer.decode(tokenizer.encode('a red car')) == 'a red car'
