"""The real configs on the meta device: every shape and count of the real models, and none of their memory."""
import numpy as np
import pytest
import torch
from conftest import REPO
from test_docs import settings_of
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from configure import configure
from data import Item, Record, Row, collate, token_row
from tools.memory import KNOWN
from model import VLM, Connector, Tower
from token_model import TokenLM
from uti import Grammar, TokenSpace

SO400M = KNOWN['google/siglip2-so400m-patch14-384']
QWEN3 = {  # parameters as published, and of the connector
    '8b': (KNOWN['Qwen/Qwen3-8B'], 8_190_735_360, 82_444_800),
    '0.6b': (KNOWN['Qwen/Qwen3-0.6B'], 596_049_920, 13_223_424)}


REAL_SPACE = TokenSpace({'name': '', 'text_rows': 151_936, 'tokenizer_sha256': '', 'end_of_text': 151_645},
                        {'size': 384, 'grid': [24, 24], 'codes': 16_384},
                        {'sample_rate': 24_000, 'samples': 240_000, 'frames': 750, 'codebooks': 2, 'codes': 1024})


@pytest.mark.parametrize('size', QWEN3)
def test_a1_has_the_real_sizes_and_takes_a_full_row(size):
    shape, llm_parameters, connector_parameters = QWEN3[size]
    s = configure(settings_of('train_a1.py'), [str(REPO / f'configs/a1_qwen3_{size}.py')])
    assert (s['num_image_tokens'], s['max_seq_len']) == (64, 512) and s['llm'].lower() == f'qwen/qwen3-{size}'
    with torch.device('meta'):
        llm = Qwen3ForCausalLM(Qwen3Config(**shape)).requires_grad_(False)
        llm.set_attn_implementation('rows')
        tower = Tower(SiglipVisionModel(SiglipVisionConfig(**SO400M)), s['tower_layer'])
        connector = Connector(tower.width, tower.side, shape['hidden_size'], s['num_image_tokens'],
                              s['connector_width'], s['connector_depth'], s['connector_heads'], s['vision_ln'])
        vlm = VLM(tower, connector, llm)
    assert sum(p.numel() for p in llm.parameters()) == llm_parameters
    trainable = sum(p.numel() for p in vlm.parameters() if p.requires_grad)
    assert trainable == connector_parameters == sum(p.numel() for p in connector.parameters())
    rows = [Row(Item(str(n), 'x', ()), np.zeros(length, np.int32), np.arange(67, length, dtype=np.int32), 1, False)
            for n, length in enumerate((512, 100))]
    batch = collate(rows, [np.zeros((3, 384, 384), np.uint8)] * 2, 64).to('meta')
    assert tower(batch.images).shape == (2, 729, 1152)
    assert vlm.image_tokens(batch.images).shape == (2, 64, shape['hidden_size'])
    assert vlm.nll(batch).shape == (512 - 67 + 100 - 67,)


@pytest.mark.parametrize('size', QWEN3)
def test_a2_adds_the_lora_that_its_formula_says(size):
    from peft import LoraConfig, get_peft_model
    shape, _, _ = QWEN3[size]
    s = configure(settings_of('train_a2.py'), [str(REPO / f'configs/a2_qwen3_{size}.py')])
    with torch.device('meta'):
        llm = Qwen3ForCausalLM(Qwen3Config(**shape))
        get_peft_model(llm, LoraConfig(r=s['lora_r'], lora_alpha=s['lora_alpha'], target_modules=s['lora_targets']))
    d, heads, kv = shape['hidden_size'], shape['num_attention_heads'] * 128, shape['num_key_value_heads'] * 128
    each = (d + heads) + 2 * (d + kv) + (heads + d) + 3 * (d + shape['intermediate_size'])   # q, k v, o, gate up down
    assert (s['lora_r'], s['lora_alpha']) == (16, 32)
    assert sum(p.numel() for n, p in llm.named_parameters() if 'lora_' in n) == 16 * each * shape['num_hidden_layers']


@pytest.mark.parametrize('size', QWEN3)
def test_b3_trains_the_new_rows_twice_and_takes_documents_of_real_length(size):
    """Janus's 16,384 codes of a 24 x 24 picture, two codebooks of 1,024 for 10 s of EnCodec at 75 frames a second."""
    shape, llm_parameters, _ = QWEN3[size]
    s = configure(settings_of('train_b3.py'), [str(REPO / f'configs/b3_qwen3_{size}.py')])
    with torch.device('meta'):
        llm = Qwen3ForCausalLM(Qwen3Config(**shape)).requires_grad_(False)
        llm.set_attn_implementation('rows')
        lm = TokenLM(llm, REAL_SPACE, s['typed_head'], s['rows_noise'])
    trained = [p for p in lm.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in trained] == [(18_436, shape['hidden_size'])] * 2   # 4 + 16,384 + 2 * 1,024
    assert sum(p.numel() for p in lm.parameters()) == llm_parameters + 2 * 18_436 * shape['hidden_size']
    grammar, rows = Grammar(REAL_SPACE), []
    for task in s['task_weights']:
        modality = 'image' if 'i' in task else 'audio'
        payload = grammar.bounds(grammar.payload_ranges[modality])[0]
        rows.append(token_row(Record(task, modality, payload, np.arange(20), ''), task, grammar, s['max_seq_len']))
    batch = collate(rows, [None] * 4, 0)
    assert batch.n_labels == lm.nll(batch.to('meta')).shape[0] == 21 + 21 + 577 + 1501


@pytest.mark.parametrize('size', QWEN3)
def test_b4_adds_the_lora_that_its_formula_says_to_the_rows_of_b3(size):
    from peft import LoraConfig, get_peft_model
    shape, _, _ = QWEN3[size]
    s = configure(settings_of('train_b4.py'), [str(REPO / f'configs/b4_qwen3_{size}.py')])
    with torch.device('meta'):
        llm = Qwen3ForCausalLM(Qwen3Config(**shape)).requires_grad_(False)
        llm.set_attn_implementation('rows')
        lm = TokenLM(llm, REAL_SPACE)
        get_peft_model(lm.llm, LoraConfig(r=s['lora_r'], lora_alpha=s['lora_alpha'], target_modules=s['lora_targets']))
    d, heads, kv = shape['hidden_size'], shape['num_attention_heads'] * 128, shape['num_key_value_heads'] * 128
    each = (d + heads) + 2 * (d + kv) + (heads + d) + 3 * (d + shape['intermediate_size'])   # q, k v, o, gate up down
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    assert trained == s['lora_r'] * each * shape['num_hidden_layers'] + 2 * 18_436 * d
    assert not s['full_tune'] and s['rows_dir'] == configure(
        settings_of('train_b3.py'), [str(REPO / f'configs/b3_qwen3_{size}.py')])['out_dir']
