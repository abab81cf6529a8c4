"""train_a2.py: it learns to answer, LoRA stays in its place, PEFT loads it, text-only loss is judged, a run goes on."""
import json
import re
import shutil
import signal

import pytest
import torch
from conftest import (
    alter_weights, assert_close_run, assert_same, assert_same_run, back_at_checkpoint, failed_gates, in_children,
    on_ranks, on_two_ranks, read_checkpoint, read_gates, read_json, read_lines, read_log, run_here, run_until)
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.stage


def test_it_learns_to_answer_every_turn_and_passes_its_gates(a2_colours):
    out = a2_colours.out
    evals = read_log(out, 'eval')
    assert [record['step'] for record in evals] == [0, 50, 60]
    assert evals[0]['correct'] > 5 and evals[-1]['correct'] < 1 < evals[-1]['shuffled'] - 1
    assert a2_colours.code == 0 and len(read_gates(out)) == 19 and '19 gates passed' in a2_colours.printed
    predictions = read_lines(out / 'predictions.jsonl')
    assert all(line['prediction'] == line['truth'] for line in predictions)
    chats = read_json(out / 'split.json')['eval'][:24]
    questions = {'picture 1': ['Which colour?', 'Again?'], 'picture 2': ['Which colour?']}
    for chat in chats:
        asked = [line['question'] for line in predictions if line['id'] == chat]
        odd = int(chat.split()[1]) % 2
        assert asked == questions['picture 1' if odd else 'picture 2']


def test_stock_peft_loads_the_adapter_and_gives_the_logits_of_the_run(a2_colours, colours):
    ids = torch.arange(5, 25)[None]                                                             # (1, T)
    base = AutoModelForCausalLM.from_pretrained(colours / 'llm')
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, a2_colours.out / 'adapter').eval()
        loaded = adapted(ids).logits
        set_peft_model_state_dict(adapted, read_checkpoint(a2_colours.out, 'lora'))
        assert torch.equal(adapted(ids).logits, loaded) and not torch.allclose(loaded, plain)
    assert_same(load_file(a2_colours.out / 'connector.safetensors'), read_checkpoint(a2_colours.out, 'connector'))


def test_replayed_text_is_the_share_of_the_examples_that_was_asked_for(a2_config, a2_run, tiny, tmp_path):
    texts = (tiny / 'text' / 'train.jsonl').read_text() + 2 * (json.dumps({'text': 400 * 'a dot '}) + '\n')
    (tmp_path / 'replay.jsonl').write_text(texts)
    _, printed = run_here('train_a2.py', a2_config, f'--out_dir={tmp_path}', '--epoch_samples=8',
                          f'--replay_jsonl={tmp_path}/replay.jsonl', '--replay_share=0.5')
    assert f'2 of {len(texts.splitlines())} texts to replay are cut at max_seq_len = 320\n' in printed
    without, with_replay = [int(re.search(r'(\d+) examples to train on', p)[1]) for p in (a2_run.printed, printed)]
    assert with_replay == 2 * without


def test_a_run_that_ruins_the_text_fails_the_text_gate(a2_run):
    gate = read_gates(a2_run.out)['text-only loss, rise over the base model']
    assert a2_run.code == 1 and gate['value'] > 0.02 and not gate['passed']


def test_lora_outside_the_layers_ends_the_run_before_the_first_step(a2_config, tmp_path):
    command = ('train_a2.py', a2_config, f'--out_dir={tmp_path}', '--epoch_samples=8',
               r'--lora_targets=lm_head|model\.layers\.0\.self_attn\.q_proj')
    name = "LoRA weights outside the language model's layers"
    code, _ = run_here(*command)
    assert code.startswith(f'this run would fail at its end by "{name}": 2, wanted = 0: set lora_targets')
    assert not (tmp_path / 'log.jsonl').exists()
    code, printed = run_here(*command, '--allow_failed_gates=True')
    assert 'it goes on, since allow_failed_gates = True' in printed
    assert code == 1 and name in failed_gates(tmp_path)
    assert read_gates(tmp_path)[name]['value'] == 2    # lora_A and lora_B of the head


def test_an_aligned_run_that_failed_or_of_other_weights_is_refused(a2_config, a1_config, tiny, tmp_path):
    shutil.copytree(tiny / 'llm', tmp_path / 'llm')
    run_here('train_a1.py', a1_config, f'--out_dir={tmp_path}/a1', f'--llm={tmp_path}/llm', '--epoch_samples=8',
             '--gate_ablation_nats=9.0')
    command = 'train_a2.py', a2_config, f'--out_dir={tmp_path}/a2', f'--align_dir={tmp_path}/a1'
    code, _ = run_here(*command)
    assert 'failed its gate "shuffled image costs more' in code
    alter_weights(tmp_path / 'llm')
    code, _ = run_here(*command, '--allow_failed_gates=True')
    assert 'was aligned to other weights' in code


def test_a_new_run_goes_on_from_the_weights_of_another_a2_run_and_of_no_a1_run(a2_config, a1_run, a2_run, tmp_path):
    run_here('train_a2.py', a2_config, f'--init_from={a2_run.out}', f'--out_dir={tmp_path}/on', '--n_steps=1',
             '--eval_first=False', '--learning_rate=1e-9', '--lora_learning_rate=1e-9')
    before, after = [read_log(out, 'eval')[-1] for out in (a2_run.out, tmp_path / 'on')]
    assert after['text'] == pytest.approx(before['text'], rel=1e-4)    # LoRA's part in it
    assert after['correct'] == pytest.approx(before['correct'], rel=1e-4)
    code, _ = run_here('train_a2.py', a2_config, f'--init_from={a1_run.out}', f'--out_dir={tmp_path}/a1')
    assert "has stage = 'a1', this run has 'a2'" in code


def test_a_killed_run_with_dropout_goes_on_as_the_same_run_to_the_last_bit(a2_config, tmp_path):
    """Dropout is a function of the step, so no generator state is needed to repeat it."""
    command = 'train_a2.py', a2_config, '--lora_dropout=0.1'
    run_here(*command, f'--out_dir={tmp_path}/whole')
    status = in_children(run_until, 6, signal.SIGKILL, run_here, *command, f'--out_dir={tmp_path}/cut')
    assert status == [-signal.SIGKILL]
    run_here(*command, f'--out_dir={tmp_path}/cut', '--resume=True')
    assert_same_run(tmp_path / 'whole', tmp_path / 'cut', tensors=['connector', 'lora'])


def test_gradient_checkpointing_is_only_memory(a2_config, a2_run, tmp_path):
    out = back_at_checkpoint(a2_run.out, tmp_path / 'out')
    code, _ = run_here('train_a2.py', a2_config, f'--out_dir={out}', '--resume=True', '--gradient_checkpointing=True')
    assert code == a2_run.code
    assert_same_run(out, a2_run.out, tensors=['connector', 'lora'])


def test_micro_batch_size_is_only_memory_and_two_ranks_are_one_run(a2_config, a2_run, tmp_path):
    out = back_at_checkpoint(a2_run.out, tmp_path / 'out')
    status = on_two_ranks(run_here, 'train_a2.py', a2_config, f'--out_dir={out}', '--resume=True',
                          '--micro_batch_size=3')
    assert status == [1, 1] and read_log(out)[-1]['step'] == 8
    assert_close_run(out, a2_run.out, ['loss', 'grad_norm', 'grad_norm_lora', 'lr_lora'])


def test_three_ranks_that_share_the_layers_are_one_run(a2_config, a2_run, tmp_path):
    """With unlike many micro-batches of a step, and items of an evaluation, on each."""
    out = back_at_checkpoint(a2_run.out, tmp_path / 'out')
    status = on_ranks(3, run_here, 'train_a2.py', a2_config, f'--out_dir={out}', '--resume=True',
                      '--micro_batch_size=1', '--shard=True')
    assert status == [a2_run.code] * 3 and read_log(out)[-1]['step'] == 8
    assert_close_run(out, a2_run.out, ['loss', 'grad_norm', 'grad_norm_lora', 'lr_lora'])


@pytest.mark.parametrize('flag, found', [
    ('--text_jsonl=nowhere', 'nowhere: cannot read this text file'),
    ('--lora_targets=nothing', 'lora_targets')])
def test_bad_input_gets_one_line(a2_config, tmp_path, flag, found):
    code, _ = run_here('train_a2.py', a2_config, f'--out_dir={tmp_path}', flag)
    assert found in code and len(code.splitlines()) == 1
