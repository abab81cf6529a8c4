"""One step of every training script in bfloat16 on a GPU is that of float32 on a CPU, to two percent; skipped without a
GPU. `python -m pytest -m cuda` on a machine that has one."""
import pytest
import torch
import training
from conftest import HAS_GPU, read_json, read_log, run_with_stubs

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
