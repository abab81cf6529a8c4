"""memory.py: what stays on a GPU is counted exactly, what is kept for the backward pass is what autograd keeps."""
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPO, run_script
from peft import LoraConfig, get_peft_model
from test_docs import settings_of
from test_real_configs import QWEN3, SO400M
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from configure import configure
from data import Item, Row, collate
from tools.memory import LORA, PLAN, B, memory_needed, table
from model import VLM, Connector, Tower
from token_model import TokenLM
from uti import TokenSpace

# -----------------------------------------------------------------------------
# what stays


@pytest.mark.parametrize('size', QWEN3)
def test_what_stays_is_counted_exactly_on_the_real_shapes(size):
    """Frozen weights 2 bytes, learned ones 4 each for the master, the gradient and the two moments of AdamW."""
    shape, n_llm, n_connector = QWEN3[size]
    llm, tower = Qwen3Config(**shape), SiglipVisionConfig(**SO400M)
    with torch.device('meta'):
        n_tower = sum(p.numel() for p in Tower(SiglipVisionModel(tower)).parameters())
    d, heads, kv = shape['hidden_size'], shape['num_attention_heads'] * 128, shape['num_key_value_heads'] * 128
    each = (d + heads) + 2 * (d + kv) + (heads + d) + 3 * (d + shape['intermediate_size'])
    n_layers = shape['num_hidden_layers'] * (
        2 * d * heads + 2 * d * kv + 3 * d * shape['intermediate_size'] + 2 * d + 2 * 128) + d   # and the last norm
    lora, rows = shape['num_hidden_layers'] * each, 2 * 18_436 * d
    for stage, how, frozen, learned in (
            ('a1', {}, n_llm + n_tower, n_connector), ('a2', {'lora_r': 16}, n_llm + n_tower, n_connector + 16 * lora),
            ('b3', {'new_rows': 18_436}, n_llm, rows),
            ('b4', {'new_rows': 18_436, 'lora_r': 64}, n_llm, rows + 64 * lora),
            ('b4', {'new_rows': 18_436, 'full_tune': True}, n_llm - n_layers, rows + n_layers)):
        need = memory_needed(stage, llm, tower, **how)
        assert [need[k] for k in ('frozen', 'trained', 'gradients', 'optimizer')] == [
            2 * frozen, 4 * learned, 4 * learned, 8 * learned], stage


# -----------------------------------------------------------------------------
# what is kept for the backward pass


def tiny_llm(half):
    torch.manual_seed(0)
    llm = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=1000, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16)).to(torch.bfloat16 if half else torch.float32)
    llm.set_attn_implementation('rows')
    return llm.requires_grad_(False)


def kept(model, batch):
    """Bytes that autograd keeps of a forward pass, each storage once, without the model's own weights; and the loss."""
    own, keeps = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        keeps[storage.data_ptr()] = (tensor, storage.nbytes())         # alive, so that no address comes again
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(batch)
    return sum(size for at, (_, size) in keeps.items() if at not in own), loss


TOWER = SiglipVisionConfig(hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                           image_size=40, patch_size=8)
SPACE = TokenSpace({'name': '', 'text_rows': 1000, 'tokenizer_sha256': '', 'end_of_text': 2},
                   {'size': 8, 'grid': [4, 8], 'codes': 300})


def grafted(half, dropout=None):
    """Six rows of 60 tokens, 8 of them an image, 40 labels; with LoRA unless dropout is None."""
    vlm = VLM(None, Connector(48, 5, 64, 8, 32, 2, 4), tiny_llm(half))
    if dropout is not None:
        get_peft_model(vlm.llm, LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=LORA))
    rows = [Row(Item(str(n), 'x', ()), np.full(60, 5, np.int32), np.arange(20, 60, dtype=np.int32), 1, False)
            for n in range(6)]
    how = {'labels': 40, 'num_image_tokens': 8, 'width': 32, 'depth': 2, 'heads': 4, 'lora_r': 4,
           'lora_dropout': dropout or 0}
    return vlm.train(), collate(rows, [np.zeros((25, 48), np.float32)] * 6, 8), how


def rows_only(half, full=False, lora=False):
    """Six rows of 60 tokens: 8 labels of text, 32 codes."""
    lm = TokenLM(tiny_llm(half), SPACE)
    if full:
        for part in lm.llm.model.layers, lm.llm.model.norm:
            part.float().requires_grad_(True)
    if lora:
        get_peft_model(lm.llm, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=LORA))
    ranges = np.repeat([0, 2], [8, 32]).astype(np.int16)
    ids = np.concatenate([np.full(28, 5), np.full(32, 1010)]).astype(np.int32)
    rows = [Row(SimpleNamespace(id=str(n)), ids, np.arange(20, 60, dtype=np.int32), -1, False, ranges)
            for n in range(6)]
    how = {'labels': 8, 'codes': 32, 'code_range': 300, 'new_rows': 304, 'lora_r': 4, 'lora_dropout': 0.1,
           'full_tune': full}
    return lm.train(), collate(rows, [None] * 6, 0), how


def fuse_attention(monkeypatch):
    """As it is on a GPU: in bf16 a CPU goes by the definition, which keeps every score."""
    def fused(q, k, v, scaling=None, dropout=0.0):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout,
                                              enable_gqa=True)
    monkeypatch.setattr('model.short_attention', fused, raising=False)


@pytest.mark.parametrize('half', [False, True], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('stage, make', [
    ('a1', grafted), ('a2', lambda half: grafted(half, 0.0)), ('a2', lambda half: grafted(half, 0.1)),
    ('b3', rows_only), ('b4', lambda half: rows_only(half, lora=True)),
    ('b4', lambda half: rows_only(half, full=True))],
    ids=['a1', 'a2', 'a2-dropout', 'b3', 'b4', 'b4-full_tune'])
def test_what_the_formula_says_is_kept_is_what_autograd_keeps(stage, make, half, monkeypatch):
    """Within a factor of 1.15 either way; and gradients and optimizer state to the byte."""
    fuse_attention(monkeypatch)
    model, batch, how = make(half)
    need = memory_needed(stage, model.llm.config, TOWER, batch_size=6, row_tokens=60, half=half, cuda=False, **how)
    found, loss = kept(model, batch)
    ratio = (need['activations'] + need['logits']) / found
    print(f'{stage} {half}: {found} bytes kept, the formula says {ratio:.3f} times that')
    assert 1 / 1.15 < ratio < 1.15
    loss.backward()
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned)
    optimizer.step()
    assert sum(p.grad.numel() * p.grad.element_size() for p in learned if p.grad is not None) == need['gradients']
    state = [t for s in optimizer.state.values() for t in s.values() if t.ndim]
    assert sum(t.numel() * t.element_size() for t in state) == need['optimizer']
    stock = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    tower = need['frozen'] - stock if stage[0] == 'a' else 0           # these models have their features given
    assert need['frozen'] == stock + tower and (tower > 0) == (stage[0] == 'a')


def test_a_formula_that_forgot_the_mlp_would_be_noticed(monkeypatch):
    fuse_attention(monkeypatch)
    model, batch, how = grafted(True)
    found, _ = kept(model, batch)
    model.llm.config.intermediate_size = 64            # instead of 192
    need = memory_needed('a1', model.llm.config, TOWER, batch_size=6, row_tokens=60, cuda=False, **how)
    assert (need['activations'] + need['logits']) / found < 1 / 1.15


def test_what_does_not_grow_does_not_and_what_does_does():
    llm, tower = Qwen3Config(**QWEN3['0.6b'][0]), SiglipVisionConfig(**SO400M)
    one, two = (memory_needed('a2', llm, tower, batch_size=n, row_tokens=100, labels=400) for n in (8, 16))
    assert two['logits'] == one['logits'] == 4 * 2048 * 151_936        # never more than 2,048 labels at a time
    assert 1.9 < two['activations'] / one['activations'] < 2.1 and two['optimizer'] == one['optimizer']
    alone, eight = (memory_needed('b4', llm, batch_size=1, ranks=n, **{**B, 'row_tokens': 8}, full_tune=True)
                    for n in (1, 8))
    assert eight['peak'] - alone['peak'] > 0           # the ranks' message: the gradients once more
    need = memory_needed('a1', llm, tower, batch_size=1)
    assert need['peak'] >= sum(size for part, size in need.items() if part != 'peak')


# -----------------------------------------------------------------------------
# the page


def test_the_table_of_the_page_is_what_the_function_gives():
    assert table() in (REPO / 'docs' / 'bigger.md').read_text()


def test_every_command_of_the_page_takes_a_batch_that_the_table_says_fits():
    fits = {(stage[:2], base, 'full' in stage): [] for _, stage, base, _ in PLAN}
    for line, (gpu, stage, base, how) in zip(table().splitlines()[2:], PLAN):
        if line.endswith('| fits |'):
            fits[stage[:2], base, 'full' in stage].append((how['batch_size'], gpu.split()[-2]))
    page, seen = (REPO / 'docs' / 'bigger.md').read_text(), 0
    for part, size in ('One card', '24'), ('One H200', '139'), ('Eight', '139'), ('Several', '139'):
        section = page[page.index(f'## {part}'):].split('\n## ')[0]
        for stage, name, more in re.findall(r'train_\w\d\.py configs/(\w\d)_qwen3_([\d.]+b)\.py(.*)', section):
            settings = configure(settings_of(f'train_{stage}.py'), [
                str(REPO / f'configs/{stage}_qwen3_{name}.py'), *more.split()])
            found = [n for n, gpu in fits[stage, f'Qwen3-{name.upper()}', 'full' in more] if gpu == size]
            assert found and settings['batch_size'] <= max(found), (part, stage, name)
            seen += 1
    assert seen == 15


def test_it_prints_its_parts_and_refuses_what_is_no_stage_or_no_model(tiny):
    done = run_script('memory.py', f'--llm={tiny}/llm', f'--vision={tiny}/vision', '--batch_size=2')
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith('peak'), done.stderr
    for change, found in (('--stage=a3', "stage = 'a3'"), ('--llm=nowhere', 'nowhere: no Hugging Face model here'),
                          (f'--llm={tiny}/vision', 'wanted that of a Qwen3Config')):
        done = run_script('memory.py', change)
        assert done.returncode == 1 and found in done.stderr and 'Traceback' not in done.stderr, done.stderr
