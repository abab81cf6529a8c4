"""The real configs on the meta device: every shape and count of the real models, and none of their memory."""
import numpy as np
import pytest
import torch
from conftest import REPO
from test_docs import settings_of
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from configure import configure
from data import collate
from examples import Example
from lists import Item
from decoders import lora
from model import VLM, Connector, Tower
from shards import Record, token_example
from token_model import TokenModel
from tools.memory import KNOWN
from uti import Grammar, TokenSpace

SO400M = KNOWN['google/siglip2-so400m-patch14-384']
QWEN3 = {  # parameters as published, and of the connector
    '8b': (KNOWN['Qwen/Qwen3-8B'], 8_190_735_360, 82_444_800),
    '0.6b': (KNOWN['Qwen/Qwen3-0.6B'], 596_049_920, 13_223_424)}

# Janus's 16,384 codes of a 24 x 24 picture, two codebooks of 1,024 for 10 s of EnCodec at 75 frames a second
REAL_SPACE = TokenSpace({'name': '', 'text_rows': 151_936, 'tokenizer_sha256': '', 'end_of_text': 151_645},
                        {'size': 384, 'grid': [24, 24], 'codes': 16_384},
                        {'sample_rate': 24_000, 'samples': 240_000, 'frames': 750, 'codebooks': 2, 'codes': 1024})
N_NEW_ROWS = 4 + 16_384 + 2 * 1_024


def settings_for(stage, size):
    return configure(settings_of(f'train_{stage}.py'), [str(REPO / f'configs/{stage}_qwen3_{size}.py')])


def real_llm(size):
    """A Qwen3 without memory, frozen."""
    with torch.device('meta'):
        llm = Qwen3ForCausalLM(Qwen3Config(**QWEN3[size][0])).requires_grad_(False)
    llm.set_attn_implementation('unpadded')
    return llm


def n_parameters(model, trainable=False):
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def n_lora_parameters(size, r):
    """By the formula: r (in + out) of q, k, v, o, gate, up and down in every layer."""
    shape, _, _ = QWEN3[size]
    d = shape['hidden_size']
    q = shape['num_attention_heads'] * 128
    kv = shape['num_key_value_heads'] * 128
    each = (d + q) + 2 * (d + kv) + (q + d) + 3 * (d + shape['intermediate_size'])
    return r * each * shape['num_hidden_layers']


@pytest.mark.parametrize('size', QWEN3)
def test_a1_has_the_real_sizes_and_takes_a_full_example(size):
    shape, n_llm, n_connector = QWEN3[size]
    s = settings_for('a1', size)
    assert (s['num_image_tokens'], s['max_seq_len']) == (64, 512) and s['llm'].lower() == f'qwen/qwen3-{size}'
    llm = real_llm(size)
    with torch.device('meta'):
        tower = Tower(SiglipVisionModel(SiglipVisionConfig(**SO400M)), s['tower_layer'])
        connector = Connector(
            tower.width, tower.side, shape['hidden_size'], num_image_tokens=s['num_image_tokens'],
            width=s['connector_width'], depth=s['connector_depth'], heads=s['connector_heads'],
            vision_ln=s['vision_ln'])
        vlm = VLM(tower, connector, llm)
    assert n_parameters(llm) == n_llm
    assert n_parameters(vlm, trainable=True) == n_connector == n_parameters(connector)
    examples = []
    for length in 512, 100:
        labels = np.arange(67, length, dtype=np.int32)
        ids = np.zeros(length, np.int32)
        examples.append(Example(Item(str(length), ('x',), ()), ids, labels, np.array([1]), False))
    batch = collate(examples, [[np.zeros((3, 384, 384), np.uint8)]] * 2, 64).to('meta')
    assert tower(batch.images).shape == (2, 729, 1152)
    assert vlm.image_tokens(batch.images).shape == (2, 64, shape['hidden_size'])
    assert vlm.nll(batch).shape == (512 - 67 + 100 - 67,)


@pytest.mark.parametrize('size', QWEN3)
def test_a2_adds_the_lora_that_its_formula_says(size):
    s = settings_for('a2', size)
    assert (s['lora_r'], s['lora_alpha'], s['max_seq_len']) == (16, 32, 2048)
    llm = real_llm(size)
    with torch.device('meta'):
        lora(llm, s['lora_r'], s['lora_alpha'], dropout=s['lora_dropout'], targets=s['lora_targets'])
    assert n_parameters(llm, trainable=True) == n_lora_parameters(size, 16)


@pytest.mark.parametrize('size', QWEN3)
def test_b3_trains_the_new_rows_twice_and_takes_documents_of_real_length(size):
    shape, n_llm, _ = QWEN3[size]
    s = settings_for('b3', size)
    llm = real_llm(size)
    with torch.device('meta'):
        model = TokenModel(llm, REAL_SPACE, s['typed_head'], s['new_rows_noise'])
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in trained] == [(N_NEW_ROWS, shape['hidden_size'])] * 2
    assert n_parameters(model) == n_llm + 2 * N_NEW_ROWS * shape['hidden_size']
    grammar = Grammar(REAL_SPACE)
    examples = []
    for task in s['task_weights']:
        modality = 'image' if 'i' in task else 'audio'
        payload, _ = grammar.bounds(grammar.payload_ranges[modality])
        record = Record(task, modality, payload, np.arange(20), '', {})
        examples.append(token_example(record, task, grammar, s['max_seq_len']))
    batch = collate(examples).to('meta')
    assert batch.n_labels == model.nll(batch).shape[0] == 21 + 21 + 577 + 1501


@pytest.mark.parametrize('size', QWEN3)
def test_b4_adds_the_lora_that_its_formula_says_to_the_rows_of_b3(size):
    shape, _, _ = QWEN3[size]
    s = settings_for('b4', size)
    llm = real_llm(size)
    with torch.device('meta'):
        model = TokenModel(llm, REAL_SPACE)
        lora(model.llm, s['lora_r'], s['lora_alpha'], dropout=s['lora_dropout'], targets=s['lora_targets'])
    wanted = n_lora_parameters(size, s['lora_r']) + 2 * N_NEW_ROWS * shape['hidden_size']
    assert n_parameters(model, trainable=True) == wanted
    assert not s['full_tune'] and s['new_rows_dir'] == settings_for('b3', size)['out_dir']
