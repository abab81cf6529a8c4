"""The slow proofs: the small world for real, from nothing to answers, judged by the truth. `make proofs`."""
import pytest
from conftest import run_script

pytestmark = pytest.mark.slow


def test_a_frozen_language_model_learns_to_caption_and_then_to_answer(tmp_path):
    done = run_script('train_a1.py', 'configs/a1_small.py', f'--out_dir={tmp_path}/a1')
    assert done.returncode == 0, done.stdout + done.stderr
    assert run_script('make_small.py', f'--score={tmp_path}/a1', '--bar=0.9').returncode == 0
    done = run_script('train_a2.py', 'configs/a2_small.py', f'--align_dir={tmp_path}/a1', f'--out_dir={tmp_path}/a2')
    assert done.returncode == 0, done.stdout + done.stderr
    assert run_script('make_small.py', f'--score={tmp_path}/a2', '--bar=0.9').returncode == 0


def test_the_sweep_finds_a_run_that_passes(tmp_path):
    done = run_script('sweep_a11.py', 'configs/a11_small.py', f'--out_dir={tmp_path}')
    assert done.returncode == 0 and (tmp_path / 'best.py').exists(), done.stdout + done.stderr
