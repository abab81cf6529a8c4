"""Decoders of transformers other than Qwen3: each comes out as its stock model does, or is refused with one line.

The table of docs/results.md: $ python -m pytest -q -s tests/test_decoders.py -k stock_model_does
"""
import re

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from test_model import assert_one_line
from tiny_worlds import tiny_space

import decoders
from data import collate, padded_layout
from decoders import embedding_rms, hidden_states, load_llm, load_tokenizer, lora, parity, text_losses, tuned_parts
from examples import NO_IMAGES, Example
from token_model import TokenModel, export_difference, export_stock

SIZES = {'vocab_size': 512, 'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2,
         'num_attention_heads': 4, 'num_key_value_heads': 2, 'head_dim': 8, 'max_position_embeddings': 128,
         'pad_token_id': 0, 'bos_token_id': None, 'eos_token_id': 2}
WINDOW = {'sliding_window': 4}                         # shorter than both rows of the check
MOE = {'num_experts': 4, 'num_experts_per_tok': 2, 'moe_intermediate_size': 32}
CLASSES = {
    'Qwen2': {}, 'Qwen3': {}, 'Qwen3Moe': MOE, 'Llama': {}, 'Mistral': WINDOW, 'Ministral': WINDOW, 'SmolLM3': {},
    'Olmo2': {}, 'Olmo3': WINDOW, 'Phi3': WINDOW, 'Gemma': {}, 'Gemma2': WINDOW | {'attn_logit_softcapping': 2.0},
    'Gemma3Text': WINDOW, 'Glm': {}, 'GPTNeoX': {}, 'Cohere': {}, 'Cohere2': WINDOW,
    'Granite': {'logits_scaling': 8.0, 'embedding_multiplier': 12.0, 'residual_multiplier': 0.2}}
REFUSED = {
    'StableLm': ({}, '0 of its 2 layers attend by a layout'),
    'Nemotron': ({}, '0 of its 2 layers attend by a layout'),
    'GptOss': ({'num_local_experts': 4, 'num_experts_per_tok': 2}, 's_aux'),
    'Lfm2': ({'layer_types': ['conv', 'full_attention']}, 'layers of conv'),
    'Bloom': ({}, 'cannot be trained here'),
    'Mamba': ({}, 'cannot be trained here')}


decoders_short_attention = decoders.short_attention   # the check below changes it


def make(folder, name, **values):
    """A random decoder of this class, its weights large enough that everything in it shows."""
    config = getattr(transformers, f'{name}Config')(**SIZES | values)
    torch.manual_seed(0)
    llm = transformers.AutoModelForCausalLM.from_config(config)
    for p in llm.parameters():
        if p.ndim > 1:
            p.data = 0.2 * torch.randn(p.shape)
    llm.save_pretrained(folder)
    return folder


def batch_of_two():
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 500, n).astype(np.int32) for n in (12, 7)]
    return collate([Example(None, row, np.arange(1, len(row)), NO_IMAGES, False) for row in ids])


def mean_loss(llm, batch):
    hidden = hidden_states(llm, llm.get_input_embeddings()(batch.input_ids), batch)
    hidden = hidden.index_select(0, batch.logit_positions)
    return text_losses(llm, hidden, batch.labels).mean()


def lora_learns(llm):
    """(PEFT's wrapper, the loss before and after some steps of LoRA alone)."""
    adapter = lora(llm, r=4, alpha=8, dropout=0.0, targets='')
    batch = batch_of_two()
    before = mean_loss(llm, batch).item()
    learned = [p for p in llm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-2)
    for _ in range(10):
        mean_loss(llm, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapter, before, mean_loss(llm, batch).item()


@pytest.mark.parametrize('name', CLASSES)
def test_a_decoder_gives_what_its_stock_model_does_and_lora_and_its_exports_work(tiny, tmp_path, name):
    folder = make(tmp_path / 'llm', name, **CLASSES[name])
    llm = load_llm(folder)                             # exits where the two differ
    found = parity(llm)
    assert found['logits'] < 1e-4 and found['greedy'] == 0

    model = TokenModel(llm, tiny_space(load_tokenizer(tiny / 'llm')), noise=0.3)
    export_stock(model, load_tokenizer(tiny / 'llm'), tmp_path / 'stock')
    example = Example(None, np.array([3, 9, 512, 530, 7], np.int32), np.arange(1, 5), NO_IMAGES, False)
    assert export_difference(model, tmp_path / 'stock', [example]) < 1e-4

    adapter, before, after = lora_learns(llm)
    assert after < before - 0.1
    adapter.save_pretrained(tmp_path / 'adapter', save_embedding_layers=False)
    again = load_llm(folder)
    PeftModel.from_pretrained(again, tmp_path / 'adapter')
    assert mean_loss(again, batch_of_two()).item() == pytest.approx(after, abs=1e-5)
    print(f'| {name} | {found["logits"]:.1g} | yes | {before:.2f} to {after:.2f} | yes |')


@pytest.mark.parametrize('name', [*CLASSES, 'GPT2', 'OPT', 'Phi'])
def test_full_tuning_takes_the_layers_and_the_last_norm_whatever_they_are_called(tmp_path, name):
    llm = load_llm(make(tmp_path / 'llm', name, **CLASSES.get(name, {})))
    parts = tuned_parts(llm)
    assert all(llm.get_submodule(full_name) is part for full_name, part in parts.items())
    left = [full_name for full_name, _ in llm.named_parameters() if not full_name.startswith(tuple(parts))]
    assert left and all(re.search('embed|wte|wpe|lm_head', full_name) for full_name in left), left
    assert sum(isinstance(module, torch.nn.Embedding) for part in parts.values() for module in part.modules()) == 0
    assert any('.0.' in full_name for full_name, _ in llm.named_parameters() if full_name not in left)


def test_a_gpt_neox_that_is_tuned_whole_is_exported_whole(tiny, tmp_path):
    llm = load_llm(make(tmp_path / 'llm', 'GPTNeoX'))
    for part in tuned_parts(llm).values():
        part.float().requires_grad_(True)
    model = TokenModel(llm, tiny_space(load_tokenizer(tiny / 'llm')), noise=0.3)
    batch = batch_of_two()
    learned = [p for p in llm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-2)
    before = mean_loss(llm, batch).item()
    for _ in range(5):
        mean_loss(llm, batch).backward()
        assert all(p.grad is not None for p in learned)
        optimizer.step()
        optimizer.zero_grad()
    assert mean_loss(llm, batch).item() < before - 0.1
    export_stock(model, load_tokenizer(tiny / 'llm'), tmp_path / 'stock')
    example = Example(None, np.array([3, 9, 512, 530, 7], np.int32), np.arange(1, 5), NO_IMAGES, False)
    assert export_difference(model, tmp_path / 'stock', [example]) < 1e-4


@pytest.mark.parametrize('name', REFUSED)
def test_a_decoder_that_would_come_out_otherwise_is_refused_with_one_line(tmp_path, name):
    values, words = REFUSED[name]
    folder = make(tmp_path, name, **values)
    with pytest.raises(SystemExit) as e:
        load_llm(folder)
    assert_one_line(e.value, folder, words, 'take another language model')


@pytest.mark.parametrize('name, part, wrong', [
    ('Granite', 'final_logits', lambda llm, logits: logits),
    ('Cohere', 'final_logits', lambda llm, logits: logits),
    ('Mistral', 'window_mask', lambda value, window: torch.ones(2 * value.shape[2:3], dtype=torch.bool).tril()),
    ('Gemma2', 'short_attention', lambda *args, softcap, **named: decoders_short_attention(*args, **named)),
    ('Qwen3', 'padded_layout', lambda lengths: padded_layout([sum(lengths)]))])
def test_the_check_notices_what_was_silently_wrong(tmp_path, monkeypatch, name, part, wrong):
    """Logits that are not scaled, a window that is not kept, scores that are not capped, examples that see each
    other."""
    folder = make(tmp_path, name, **CLASSES[name])
    monkeypatch.setattr(decoders, part, wrong)
    with pytest.raises(SystemExit) as e:
        load_llm(folder)
    assert_one_line(e.value, folder, 'comes out otherwise here than in transformers', 'nats per label')


@torch.no_grad()
def test_image_tokens_start_at_the_size_of_what_the_embedding_layer_gives_out(tmp_path):
    """Gemma's multiplies its rows by the root of the width, and takes image tokens as they come."""
    llm = load_llm(make(tmp_path, 'Gemma3Text'))
    out = llm.get_input_embeddings()(torch.arange(512))
    assert embedding_rms(llm) == pytest.approx(out.square().mean().sqrt().item(), rel=1e-3)
    assert embedding_rms(llm) == pytest.approx(0.2 * 32 ** 0.5, rel=0.05)
