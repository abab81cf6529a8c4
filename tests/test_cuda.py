"""One step of every training script in bfloat16 on a GPU is that of float32 on a CPU, to two percent, and attention
without pads that with them; skipped without a GPU. `python -m pytest -m cuda` on a machine that has one."""
import decoders
import numpy as np
import pytest
import torch
import training
from conftest import HAS_GPU, read_json, read_log, run_with_stubs
from tiny_worlds import tiny_space
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from data import padded_layout
from decoders import load_llm
from examples import NO_IMAGES, Example
from token_model import TokenModel, export_difference, export_stock, text_difference
from uti import TokenSpace

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not HAS_GPU, reason='needs a GPU')]


@pytest.mark.parametrize('stage, came_from', [('a1', None), ('a2', 'a1'), ('b3', None), ('b4', 'b3')])
def test_the_first_step_on_a_gpu_is_that_of_a_cpu(stage, came_from, tmp_path, monkeypatch, request):
    config = request.getfixturevalue(f'{stage}_config')
    on_cpu = request.getfixturevalue(f'{stage}_run')
    n = read_log(on_cpu.out, 'run')[0]['settings']['global_batch_size']
    if came_from:
        # a stage refuses the one before when that had frozen weights of another precision: here it may
        meta = read_json(request.getfixturevalue(f'{came_from}_run').out / 'ckpt' / 'meta.json')
        monkeypatch.setattr(training, 'frozen_sha256', lambda model, trainable: meta['frozen_sha256'])
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    code, _ = run_with_stubs(f'train_{stage}.py', config, f'--out_dir={tmp_path}', '--device=cuda', '--dtype=bfloat16',
                             f'--epoch_samples={n}')
    assert code in (0, 1)                              # a single step may fail its gates
    step = read_log(tmp_path)[0]
    wanted = read_log(on_cpu.out)[0]
    for key in 'loss', 'grad_norm':
        assert step[key] == pytest.approx(wanted[key], rel=2e-2)
    assert torch.cuda.max_memory_allocated() > 0


@pytest.mark.parametrize('lengths', [[1, 2, 300, 7], [64] * 5, [1]], ids=str)
def test_attention_without_pads_is_that_with_them(lengths, monkeypatch):
    """In bfloat16, two query heads to a key: outputs and gradients to its rounding, examples apart in both."""
    torch.manual_seed(0)
    layout = padded_layout(lengths).to('cuda')
    shapes = ((4, 32), (2, 32), (2, 32))               # heads, head width of queries, keys, values
    inputs = [torch.randn(1, heads, sum(lengths), width, device='cuda') for heads, width in shapes]
    weights = torch.randn(1, sum(lengths), 4, 32, device='cuda')

    def outputs_and_gradients():
        leaves = [x.bfloat16().requires_grad_() for x in inputs]
        attended, _ = decoders.unpadded_attention(None, *leaves, None, scaling=0.2, layout=layout)
        (attended.float() * weights).sum().backward()
        return [attended, *(leaf.grad for leaf in leaves)]

    assert decoders.has_varlen(torch.zeros(1, dtype=torch.bfloat16, device='cuda'))
    without_pads = outputs_and_gradients()
    monkeypatch.setattr(decoders, 'varlen_attn', None)
    assert not decoders.has_varlen(torch.zeros(1, dtype=torch.bfloat16, device='cuda'))
    for found, wanted in zip(without_pads, outputs_and_gradients()):
        torch.testing.assert_close(found.float(), wanted.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('n_rows', [515, 4096])
def test_an_export_and_the_text_of_a_typed_head_are_the_stock_models_to_the_bit(tiny, tmp_path, dtype, n_rows):
    """Wide enough that cuBLAS picks its kernels by the number of rows."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / 'llm')
    torch.manual_seed(0)
    config = Qwen3Config.from_pretrained(tiny / 'llm', hidden_size=1024, head_dim=64, vocab_size=n_rows)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / 'llm')
    space = tiny_space(tokenizer)
    space = TokenSpace({**space.base, 'text_rows': n_rows}, space.image, space.audio)
    model = TokenModel(load_llm(tmp_path / 'llm', dtype), space).to('cuda')
    export_stock(model, tokenizer, tmp_path / 'export')
    rng = np.random.default_rng(0)
    examples = []
    for n in 5, 64, 333:
        ids = rng.integers(3, 500, n).astype(np.int32)
        examples.append(Example(None, ids, np.arange(1, n), NO_IMAGES, False))
    assert export_difference(model, tmp_path / 'export', examples) == 0
    assert text_difference(model, examples) == 0


def test_two_deterministic_runs_on_a_gpu_are_the_same_to_the_bit(tmp_path, monkeypatch, a1_config):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    losses = []
    for name in 'one', 'two':
        run_with_stubs('train_a1.py', a1_config, f'--out_dir={tmp_path}/{name}', '--device=cuda',
                       '--deterministic=True')
        losses.append([(record['loss'], record['grad_norm']) for record in read_log(tmp_path / name)])
    assert losses[0] == losses[1]
