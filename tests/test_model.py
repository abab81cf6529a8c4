"""model.py: tower, connector, attention over unpadded examples, losses, ablation, cached features, generation."""
import contextlib
import copy
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
import torch.nn.functional as F
from conftest import on_two_ranks
from PIL import Image
from safetensors.torch import load_file, save_file
from test_common import no_file_larger_than
from transformers import AutoTokenizer, Qwen3ForCausalLM, SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel
from transformers.cache_utils import DynamicCache

import codec
import examples
import decoders
import inference
import model
import uti
from common import init_ranks, shutdown_ranks, write_sealed
from templates import ChatTemplate
from examples import Examples
from data import Loader, answer_starts, collate, image_reader, padded_layout
from lists import Item, read_llava
from media import BadSample, BadSamples, read_image
from inference import (
    VisionChat, ablation_means, complete_examples, crossed_losses, image_ablation, images_before, token_moments)
from decoders import (
    Continuation, GrowingLayer, generate, hidden_states, label_losses, load_llm, load_tokenizer, lora, pick,
    short_attention)
from model import VLM, Connector, Tower, cache_features, image_reading, image_settings, load_tower, load_vlm

SHAPE = {'num_image_tokens': 4, 'width': 16, 'depth': 2, 'heads': 2, 'vision_ln': True}
READ = partial(read_image, size=32, resample=3)


def assert_one_line(error, *parts):
    """The message is one line and says all of this."""
    text = str(error)
    assert '\n' not in text
    for part in parts:
        assert str(part) in text


def enlarge(*modules):
    """Large random matrices: every token and every image moves the losses."""
    with torch.no_grad():
        for module in modules:
            for p in module.parameters():
                if p.ndim >= 2:
                    p.normal_(std=0.3)


@pytest.fixture(scope='module')
def world(tiny, tmp_path_factory):
    """A VLM of the tiny models, a stock Qwen3 of the same weights, 24 captions, and 4 mixed examples."""
    torch.manual_seed(0)
    vlm = load_vlm(tiny / 'llm', tiny / 'vision', SHAPE)
    enlarge(vlm.llm, vlm.tower, vlm.connector.projector[2])
    stock = Qwen3ForCausalLM.from_pretrained(tiny / 'llm', attn_implementation='sdpa').eval()
    stock.load_state_dict(vlm.llm.state_dict())
    template = ChatTemplate(AutoTokenizer.from_pretrained(tiny / 'llm'), 4, 256)
    bad_samples = BadSamples(tmp_path_factory.mktemp('world') / 'bad.jsonl', 0)
    items = read_llava(tiny / 'captions' / 'data.json', tiny / 'captions' / 'images', bad_samples)
    talks = read_llava(tiny / 'instruct' / 'data.json', tiny / 'instruct' / 'images', bad_samples)
    captions = [template.caption(item) for item in items[:24]]
    text_only = template.chat(Item('text', (), (('why', 'a red dot'), ('and', 'no'))))
    mixed = [captions[0], template.chat(talks[0]), text_only, template.chat(talks[1])]
    loader = Loader(image_reader(READ), 4, bad_samples)
    return SimpleNamespace(vlm=vlm, stock=stock, template=template, loader=loader, captions=captions, mixed=mixed)


def losses_alone(world, example):
    """Loss of each label of one example through the stock model, with logits over all of V at every position."""
    ids = torch.from_numpy(example.ids).long()
    embeds = world.stock.get_input_embeddings()(ids).clone()
    for start, path in zip(example.image_starts, example.item.images, strict=True):
        pixels = torch.from_numpy(READ(path))
        embeds[start:start + 4] = world.vlm.image_tokens(pixels[None])[0]
    logits = world.stock(inputs_embeds=embeds[None]).logits[0]
    return F.cross_entropy(logits[example.label_positions - 1], ids[example.label_positions], reduction='none')


# -----------------------------------------------------------------------------
# loading

def save_noise(path, seed=0):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(path)
    return path


@torch.no_grad()
def test_the_tower_gives_what_the_stock_processor_and_model_give(tiny, tmp_path):
    file = save_noise(tmp_path / 'a.png')
    processor = SiglipImageProcessorPil.from_pretrained(tiny / 'vision')
    with Image.open(file) as image:
        pixels = processor(image, return_tensors='pt')['pixel_values']
    stock = SiglipVisionModel.from_pretrained(tiny / 'vision').eval()(pixels, output_hidden_states=True)
    ours = torch.from_numpy(READ(file))[None]
    tower = load_tower(tiny / 'vision')
    assert torch.allclose((ours - tower.mean) / tower.std, pixels, atol=1e-6)
    features = tower(ours)
    assert features.shape == (1, 16, 32)               # (32 / 8) ** 2 patches: no class token
    assert torch.allclose(features, stock.last_hidden_state, atol=1e-5)
    assert len(stock.hidden_states) == 3               # after the embeddings, after block 1, after block 2
    second_last = load_tower(tiny / 'vision', layer=-2)(ours)
    assert torch.allclose(second_last, stock.hidden_states[1], atol=1e-5)


def make_clip(folder):
    torch.manual_seed(0)
    transformers.CLIPModel(transformers.CLIPConfig(
        text_config={**SMALL_LAYERS, 'vocab_size': 64}, projection_dim=16,
        vision_config={**SMALL_LAYERS, 'image_size': 32, 'patch_size': 8})).save_pretrained(folder)
    transformers.CLIPImageProcessorPil(size={'shortest_edge': 37}, crop_size=32).save_pretrained(folder)
    return transformers.CLIPVisionModel, transformers.CLIPImageProcessorPil


def make_dinov2(folder):
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(
        **SMALL_LAYERS, image_size=56, patch_size=8)).save_pretrained(folder)
    transformers.BitImageProcessorPil(size={'shortest_edge': 37}, crop_size=32).save_pretrained(folder)
    return transformers.Dinov2Model, transformers.BitImageProcessorPil


SMALL_LAYERS = {'hidden_size': 32, 'intermediate_size': 64, 'num_attention_heads': 2, 'num_hidden_layers': 2}


@torch.no_grad()
@pytest.mark.parametrize('make', [make_clip, make_dinov2])
@pytest.mark.parametrize('size', [(40, 56), (56, 41), (32, 32)])
def test_towers_with_a_class_token_give_the_patches_of_the_middle_that_their_processor_cuts_out(tmp_path, make, size):
    cls, processor_cls = make(tmp_path)
    file = tmp_path / 'a.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(file)
    with Image.open(file) as image:
        pixels = processor_cls.from_pretrained(tmp_path)(image, return_tensors='pt')['pixel_values']
    stock = cls.from_pretrained(tmp_path).eval()(pixels, output_hidden_states=True)
    tower = load_tower(tmp_path)
    ours = torch.from_numpy(image_reading(image_settings(tmp_path))(file))[None]
    assert torch.allclose((ours - tower.mean) / tower.std, pixels, atol=1e-5)
    assert tower.side == 4 and tower(ours).shape == (1, 16, 32)
    assert torch.allclose(tower(ours), stock.last_hidden_state[:, 1:], atol=1e-5)
    assert torch.allclose(load_tower(tmp_path, -2)(ours), stock.hidden_states[1][:, 1:], atol=1e-5)
    change_json(tmp_path / 'preprocessor_config.json', size={'shortest_edge': 20})
    with pytest.raises(SystemExit) as e:
        load_tower(tmp_path)
    assert_one_line(e.value, 'wanted a shortest_edge of at least 32 pixels')


@pytest.mark.parametrize('layer', [-3, 0])
def test_a_tower_layer_that_is_not_there_is_refused(tiny, layer):
    with pytest.raises(SystemExit) as e:
        load_tower(tiny / 'vision', layer)
    assert_one_line(e.value, f'tower_layer = {layer}', 'wanted -2 to -1')


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize('name', ['preprocessor_config.json', 'processor_config.json'])
def test_pixels_are_normalised_with_the_mean_and_deviation_of_the_processors_file(tiny, tmp_path, name):
    shutil.copytree(tiny / 'vision', tmp_path / 'vision')
    own = tmp_path / 'vision' / 'preprocessor_config.json'
    change_json(own, image_mean=[0.1, 0.2, 0.3], image_std=[0.2, 0.4, 0.7])
    if name != own.name:                               # as transformers 5 saves a whole processor
        (tmp_path / 'vision' / name).write_text(json.dumps({'image_processor': json.loads(own.read_text())}))
        own.unlink()
    tower = load_tower(tmp_path / 'vision')
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    assert ((pixels - tower.mean) / tower.std).flatten().tolist() == pytest.approx([-0.5, 0, 1])


def move_processor(folder):
    """Where transformers 5 writes it when a whole SiglipProcessor is saved."""
    stored = json.loads((folder / 'preprocessor_config.json').read_text())
    (folder / 'preprocessor_config.json').unlink()
    (folder / 'processor_config.json').write_text(json.dumps({'image_processor': stored, 'processor_class': 'X'}))


def test_the_processor_may_stand_in_processor_config_json(tiny, tmp_path):
    folder = tmp_path / 'vision'
    shutil.copytree(tiny / 'vision', folder)
    change_json(folder / 'preprocessor_config.json', image_mean=[0.1, 0.2, 0.3], resample=2)
    wanted = {'size': 32, 'resample': 2, 'mean': [0.1, 0.2, 0.3], 'std': [0.5, 0.5, 0.5]}
    assert image_settings(folder) == wanted
    (folder / 'processor_config.json').write_text('{"processor_class": "SiglipProcessor"}')   # as older versions do
    assert image_settings(folder) == wanted
    move_processor(folder)
    assert image_settings(folder) == wanted
    assert SiglipImageProcessorPil.from_pretrained(folder).image_mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize('change, message', [
    (None, 'processor_config.json is not there; preprocessor_config.json is not there'),
    ('{"image_me', 'not valid JSON'),
    ('[]', 'found list'),
    ('{}', 'image_mean is None'),
    ({'image_std': [0.5]}, 'image_std is [0.5]'),
    ({'rescale_factor': 1 / 127.5}, 'rescale_factor is 0.00784'), ({'rescale_factor': None}, 'rescale_factor is None'),
    ({'rescale_offset': True}, 'no rescale_offset'),
    ({'resample': None}, 'resample is None'),
    ({'size': {'height': 64, 'width': 64}}, "size is {'height': 64, 'width': 64}, but the tower takes 32 x 32"),
    ({'size': {'shortest_edge': 16}}, "size is {'shortest_edge': 16}"),
    ({'do_rescale': False}, 'wanted a processor that resizes, rescales'),
])
def test_a_tower_without_a_processor_or_with_another_is_refused_with_one_line(tiny, tmp_path, change, message):
    folder = tmp_path / 'vision'
    shutil.copytree(tiny / 'vision', folder)
    file = folder / 'preprocessor_config.json'
    if change is None:
        file.unlink()
    elif isinstance(change, str):
        file.write_text(change)
    else:
        change_json(file, **change)
    with pytest.raises(SystemExit) as e:
        load_tower(folder)
    assert_one_line(e.value, folder, message)


def test_a_processor_that_could_not_be_fetched_is_not_one_that_is_absent(tiny, tmp_path, monkeypatch):
    """A tower of the hub, offline, of which the cache has some files."""
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    snapshot = tmp_path / 'models--org--tower' / 'snapshots' / 'abc'
    shutil.copytree(tiny / 'vision', snapshot)
    (tmp_path / 'models--org--tower' / 'refs').mkdir()
    (tmp_path / 'models--org--tower' / 'refs' / 'main').write_text('abc')
    wanted = image_settings(tiny / 'vision')
    assert image_settings('org/tower') == wanted
    move_processor(snapshot)
    assert image_settings('org/tower') == wanted
    (snapshot / 'processor_config.json').unlink()
    with pytest.raises(SystemExit) as e:
        image_settings('org/tower')
    assert_one_line(e.value, 'preprocessor_config.json: We couldn', 'connect')


LOADERS = {'llm': load_llm, 'vision': load_tower}
WEIGHT = {'llm': 'model.layers.1.mlp.up_proj.weight', 'vision': 'vision_model.encoder.layers.1.mlp.fc1.weight'}


@pytest.mark.parametrize('kind, damage, message', [
    ('llm', 'missing', 'lacks weights: model.layers.1.mlp.up_proj.weight'),
    ('vision', 'missing', 'lacks weights: encoder.layers.1.mlp.fc1.weight'),
    ('llm', 'unknown', 'has unknown weights: stranger'),
    ('vision', 'misshapen', 'has misshapen weights'),
    ('llm', 'cut', 'cannot load its weights'),
    ('vision', 'no file', 'cannot load its weights'),
    ('llm', 'no folder', 'no Hugging Face model here'),
])
def test_a_model_that_is_not_whole_is_refused_with_one_line(tiny, tmp_path, kind, damage, message):
    folder = tmp_path / kind
    file = folder / 'model.safetensors'
    shutil.copytree(tiny / kind, folder)
    weights = load_file(file)
    if damage == 'missing':
        del weights[WEIGHT[kind]]
    elif damage == 'unknown':
        weights['stranger'] = torch.zeros(1)
    elif damage == 'misshapen':
        weights[WEIGHT[kind]] = torch.zeros(3, 3)
    save_file(weights, file, metadata={'format': 'pt'})
    if damage == 'cut':
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == 'no file':
        file.unlink()
    elif damage == 'no folder':
        shutil.rmtree(folder)
    with pytest.raises(SystemExit) as e:
        LOADERS[kind](folder)
    assert_one_line(e.value, folder, message)


@pytest.mark.parametrize('kind, other', [('llm', 'vit'), ('llm', 'zzz'), ('vision', 'siglip2')])
def test_a_model_of_another_type_is_refused_with_one_line(tiny, tmp_path, kind, other):
    shutil.copytree(tiny / kind, tmp_path / kind)
    change_json(tmp_path / kind / 'config.json', model_type=other)
    with pytest.raises(SystemExit) as e:
        LOADERS[kind](tmp_path / kind)
    assert_one_line(e.value, tmp_path / kind, other)


@pytest.mark.parametrize('kind, load', [
    ('llm', load_llm), ('llm', load_tokenizer), ('llm', uti.load_base), ('vision', load_tower),
    ('llm', codec.load_image_codec), ('llm', partial(codec.load_audio_codec, clip_seconds=1.0))])
@pytest.mark.parametrize('model_type', ['its own', 'theirs'])
def test_code_in_a_models_folder_never_runs_and_nobody_is_asked(tiny, tmp_path, monkeypatch, kind, load, model_type):
    """A folder that names its own code is loaded by the class that transformers ships, or refused with one line."""
    monkeypatch.setattr('builtins.input', lambda *_: 'y')
    folder = tmp_path / kind
    shutil.copytree(tiny / kind, folder)
    (folder / 'theirs.py').write_text(f'open({str(tmp_path / "it_ran")!r}, "w")')
    auto_map = {'AutoConfig': 'theirs.A', 'AutoModelForCausalLM': 'theirs.B', 'AutoModel': 'theirs.B',
                'AutoTokenizer': ['theirs.C', None], 'AutoImageProcessor': 'theirs.D'}
    other = {} if model_type == 'its own' else {'model_type': model_type}
    change_json(folder / 'config.json', auto_map=auto_map, **other)
    change_json(folder / ('tokenizer_config.json' if kind == 'llm' else 'preprocessor_config.json'), auto_map=auto_map)
    is_codec = load not in (load_llm, load_tokenizer, uti.load_base, load_tower)
    if other or is_codec:
        with pytest.raises(SystemExit) as e:
            load(str(folder))
        assert_one_line(e.value, folder)
    else:
        load(str(folder))
    assert not (tmp_path / 'it_ran').exists()


@pytest.mark.parametrize('content', [None, '', '{"version": "1.0", "trunc', '{}', '[]', 'null', '{"added_tokens": []}'])
@pytest.mark.parametrize('load', [load_tokenizer, uti.load_base])
def test_a_damaged_or_absent_tokenizer_is_one_line(tiny, tmp_path, content, load):
    shutil.copytree(tiny / 'llm', tmp_path / 'llm')
    file = tmp_path / 'llm' / 'tokenizer.json'
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit) as e:
        load(str(tmp_path / 'llm'))
    assert_one_line(e.value, tmp_path / 'llm', 'wanted a whole tokenizer.json')


@pytest.mark.parametrize('llm_width, n_parameters', [(4096, 82_444_800), (1024, 13_223_424)])    # Qwen3-8B and 0.6B
def test_the_connector_has_the_right_size_for_so400m_and_real_llms(llm_width, n_parameters):
    # 590,336 enter + 32,768 latents + 2 * 3,151,360 blocks + 1,024 norm + (512 + 1) * 4 D + (4 D + 1) * D projector
    config = SiglipVisionConfig(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
                                image_size=384, patch_size=14)
    with torch.device('meta'):
        tower = Tower(SiglipVisionModel(config))
        connector = Connector(tower.width, tower.side, llm_width)
        patches = tower(torch.zeros(2, 3, 384, 384, dtype=torch.uint8))
        tokens = connector(patches)
    assert patches.shape == (2, 729, 1152)             # (384 // 14) ** 2, no class token
    assert tokens.shape == (2, 64, llm_width)
    assert sum(p.numel() for p in connector.parameters()) == n_parameters


# -----------------------------------------------------------------------------
# attention over unpadded examples, and the loss

@torch.no_grad()
def test_an_unpadded_batch_gives_the_losses_that_each_example_gives_alone(world):
    batch = world.loader.collate(world.mixed)
    lengths = [len(example) for example in world.mixed]
    assert len(set(lengths)) == 4                      # four lengths: pads are there to go wrong
    want = torch.cat([losses_alone(world, example) for example in world.mixed])
    assert torch.allclose(world.vlm.nll(batch), want, atol=1e-5, rtol=1e-5)
    for groups in [len(lengths)], [2, len(lengths) - 2]:
        grouped = replace(batch, layout=padded_layout(lengths, groups))
        assert torch.allclose(world.vlm.nll(grouped), want, atol=1e-5, rtol=1e-5)
    one_long_example = replace(batch, layout=padded_layout([sum(lengths)]))
    assert (world.vlm.nll(one_long_example) - want).abs().max() > 0.1   # the test would see examples look across


def attention_of_boundaries(query, key, value, boundaries, same, longest, _, scale, window_size, enable_gqa):
    """What varlen_attn is documented to do: (T, heads, .) of examples that lie between these boundaries, on a CPU."""
    assert boundaries.dtype == torch.int32 and boundaries is same and window_size == (-1, 0)
    assert longest == boundaries.diff().max()
    outputs = []
    for parts in zip(*(x.split(boundaries.diff().tolist()) for x in (query, key, value))):
        q, k, v = (part.transpose(0, 1) for part in parts)                                      # (heads, T, .)
        outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa))
    return torch.cat(outputs, dim=1).transpose(0, 1)


@torch.no_grad()
def test_where_attention_needs_no_pads_it_gets_none(world, monkeypatch):
    batch = world.loader.collate(world.mixed)
    want = world.vlm.nll(batch)
    monkeypatch.setattr(decoders, 'varlen_attn', attention_of_boundaries)
    monkeypatch.setattr(decoders, 'has_varlen', lambda value: True)
    assert torch.allclose(world.vlm.nll(batch), want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_by_its_definition_is_stock_attention():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    stock = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert torch.allclose(short_attention(query, key, value), stock, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_changing_one_example_changes_no_others_loss_by_one_bit(world, dtype):
    batch = world.loader.collate(world.mixed)
    starts = np.cumsum([0, *map(len, world.mixed)])
    images = world.vlm.image_tokens(batch.images)
    vlm = copy.deepcopy(world.vlm)
    vlm.llm.to(dtype)
    before = vlm.nll(batch, images)
    ids = batch.input_ids.clone()
    ids[starts[1]:starts[2]] //= 2
    after = vlm.nll(replace(batch, input_ids=ids), images)
    others = batch.label_examples != 1
    assert torch.equal(before[others], after[others])
    assert (before[~others] != after[~others]).any()
    full = world.vlm.nll(batch, images)                # in bf16 near those of float32, about 9 nats each
    assert torch.allclose(before, full, rtol=0.05)
    assert abs(before.mean() / full.mean() - 1) < 0.01


def test_no_gradient_flows_from_one_examples_loss_to_anothers_image(world):
    batch = world.loader.collate(world.captions[:3])
    images = world.vlm.image_tokens(batch.images).detach().requires_grad_()
    world.vlm.nll(batch, images)[batch.label_examples == 1].sum().backward()
    assert [bool(grad.any()) for grad in images.grad] == [False, True, False]


def test_loss_and_gradient_of_text_are_those_of_a_stock_padded_batch(world):
    """As stage A2 trains on chats and replayed text: one update's loss, and its gradient of a weight."""
    chat = world.template.chat(Item('chat', (), (('what is it', 'a red dot'), ('and where', 'left of the circle'))))
    examples = [chat, world.template.text('a story of a small green square', 'text 0'), world.mixed[2]]
    longest = max(map(len, examples))
    input_ids = torch.full((3, longest), world.template.end)
    attention_mask = torch.zeros(3, longest, dtype=torch.long)
    labels = torch.full((3, longest), -100)
    for n, example in enumerate(examples):
        ids = torch.from_numpy(example.ids).long()
        input_ids[n, :len(ids)] = ids
        attention_mask[n, :len(ids)] = 1
        labels[n, example.label_positions] = ids[example.label_positions]

    weight = 'model.layers.0.mlp.up_proj.weight'
    stock = copy.deepcopy(world.stock)
    want = stock(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
    want.backward()
    llm = copy.deepcopy(world.vlm.llm).requires_grad_(True)
    batch = collate(examples)
    loss = VLM(None, None, llm)(batch) / batch.n_labels
    loss.backward()
    want_grad = stock.get_parameter(weight).grad
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert (llm.get_parameter(weight).grad - want_grad).abs().max() < 1e-5 * want_grad.abs().max()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_in_bf16_on_cuda_an_unpadded_batch_is_near_float32_on_a_cpu(world):
    batch = world.loader.collate(world.mixed)
    vlm = copy.deepcopy(world.vlm).cuda()
    vlm.llm.bfloat16()
    with torch.no_grad():
        want = world.vlm.nll(batch)
        images = world.vlm.image_tokens(batch.images)
        embeds = world.vlm.embed(batch.input_ids, batch.image_positions, images)
        want_hidden = hidden_states(world.vlm.llm, embeds, batch)
    on_gpu = batch.to('cuda')
    losses = vlm.nll(on_gpu)
    losses.sum().backward()
    assert {p.grad.dtype for p in vlm.connector.parameters()} == {torch.float32}
    with torch.no_grad(), vlm.precision():
        hidden = hidden_states(vlm.llm, embeds.cuda().bfloat16(), on_gpu).float().cpu()
    assert torch.allclose(losses.detach().cpu(), want, rtol=0.1)   # 0.04 in bf16 on a CPU
    assert abs(losses.mean().item() / want.mean().item() - 1) < 0.01
    assert (hidden - want_hidden).norm() < 0.05 * want_hidden.norm()   # 0.024


@pytest.mark.parametrize('head_learns', [True, False])
def test_losses_in_chunks_are_the_losses_at_once_with_the_same_gradient(head_learns):
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50).requires_grad_(head_learns)
    hidden = torch.randn(10, 8, requires_grad=True)
    labels = torch.randint(50, (10,))
    learned = [hidden, *(head.parameters() if head_learns else ())]
    n_logits = []
    head.register_forward_hook(lambda _, args, logits: n_logits.append(logits.numel()))
    found = []
    for chunk in 10, 3:
        losses = label_losses(hidden, head, labels, 50, head_learns, at_once=chunk * 50)
        grads = torch.autograd.grad((losses * torch.arange(10)).sum(), learned)
        found.append([losses, *grads])
    for at_once, in_chunks in zip(*found):
        assert torch.allclose(at_once, in_chunks, atol=1e-5)
    assert n_logits[0] == 500 and max(n_logits[1:]) == 150
    # once for the loss, and once more for the gradient only where the head learns
    assert len(n_logits) == 1 + (8 if head_learns else 4)
    with torch.no_grad():
        assert torch.equal(label_losses(hidden, head, labels, 50, head_learns, at_once=150), found[1][0])


@torch.no_grad()
def test_image_tokens_go_to_the_pads_and_nowhere_else(world):
    batch = world.loader.collate(world.mixed)
    tokens = torch.randn(3, 4, 32)                     # three of the four examples have an image
    embeds = world.vlm.embed(batch.input_ids, batch.image_positions, tokens)
    is_pad = batch.input_ids == world.captions[0].ids[1]
    assert is_pad.sum() == 12
    assert torch.equal(embeds[is_pad], tokens.flatten(0, 1))
    assert torch.equal(embeds[~is_pad], world.vlm.llm.get_input_embeddings()(batch.input_ids)[~is_pad])


@pytest.fixture(scope='module')
def several(world):
    """Chats of one to three images, in any question."""
    pictures = iter([example.item.images[0] for example in world.captions])
    chats = []
    for n, places in enumerate(6 * [((0, 0),), ((0, 0), (0, 0)), ((0, 3), (1, 0)), ((0, 0), (1, 4), (1, 4))]):
        if len(chats) < 11:                            # 22 of the 24 pictures
            paths = tuple(next(pictures) for _ in places)
            turns = (('One or two', f'a red dot {n}'), ('What differs?', 'the place'))
            chats.append(world.template.chat(Item(str(n), paths, turns, image_places=places)))
    return chats


@torch.no_grad()
def test_each_of_several_images_stands_in_its_place_and_two_exchanged_are_another_example(world, several):
    batch = world.loader.collate([several[1], *world.mixed, several[3]])
    losses = world.vlm.nll(batch)
    for k, example in (0, several[1]), (len(batch.ids) - 1, several[3]):
        mine = losses[batch.label_examples == k]
        assert torch.allclose(mine, losses_alone(world, example), atol=1e-4)
        exchanged = replace(example, item=replace(example.item, images=example.item.images[::-1]))
        assert (losses_alone(world, exchanged) - mine).abs().max() > 1e-3
        other = world.vlm.nll(world.loader.collate([exchanged]))
        assert torch.allclose(other, losses_alone(world, exchanged), atol=1e-4)


@torch.no_grad()
def test_a_prompt_has_the_images_that_stand_before_its_end(world, several):
    chat = several[3]                                  # one image in the first question, two in the second
    starts = answer_starts(chat)
    prompts = [(chat, start) for start in starts] + [(several[0], 30)]
    outputs = complete_examples(world.vlm, world.loader, prompts, 3, max_new_tokens=3, stop_ids=[])
    for n_images, start, output in zip((1, 3), starts, outputs):
        item = replace(chat.item, images=chat.item.images[:n_images])
        losses = []
        for id in output[0], *range(20, 60):           # greedy: the likeliest of all
            ids = np.append(chat.ids[:start], id).astype(np.int32)
            cut = replace(chat, item=item, ids=ids, label_positions=np.array([start]),
                          image_starts=chat.image_starts[:n_images])
            losses.append(losses_alone(world, cut).item())
        assert losses[0] <= min(losses) + 1e-4


def names_with_gradient(module):
    return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}


def test_the_gradient_reaches_every_connector_parameter_and_no_frozen_one(world):
    vlm = copy.deepcopy(world.vlm)
    vlm(world.loader.collate(world.mixed)).backward()
    assert names_with_gradient(vlm) == {f'connector.{name}' for name, _ in vlm.connector.named_parameters()}
    assert 'connector.vision_ln.weight' in names_with_gradient(vlm)


def test_train_leaves_the_frozen_parts_in_eval_mode(world):
    vlm = copy.deepcopy(world.vlm)
    assert vlm.train() is vlm and vlm.connector.training
    assert not any(m.training for part in (vlm.tower, vlm.llm) for m in part.modules())
    next(vlm.llm.parameters()).requires_grad_(True)
    assert vlm.train().llm.training and not vlm.tower.training
    assert not any(m.training for m in vlm.eval().modules())


def test_with_frozen_weights_in_bf16_the_connector_learns_in_float32(tiny, world):
    batch = world.loader.collate(world.mixed)
    losses = {}
    for dtype in torch.bfloat16, torch.float32:
        torch.manual_seed(0)
        vlm = load_vlm(tiny / 'llm', tiny / 'vision', SHAPE, dtype=dtype)
        losses[dtype] = vlm.nll(batch)
        losses[dtype].sum().backward()
        assert {p.dtype for part in (vlm.tower, vlm.llm) for p in part.parameters()} == {dtype}
        assert {p.grad.dtype for p in vlm.connector.parameters()} == {torch.float32}
    half, full = losses.values()
    assert half.dtype == torch.float32
    assert (half - full).abs().mean() < 0.02 * full.mean()


def test_image_tokens_start_at_the_size_of_the_llms_embeddings(tiny, world):
    torch.manual_seed(0)
    vlm = load_vlm(tiny / 'llm', tiny / 'vision', SHAPE)
    tokens = vlm.image_tokens(world.loader.images(world.captions))
    ratio = tokens.square().mean() / vlm.llm.get_input_embeddings().weight.square().mean()
    assert 0.5 < ratio.sqrt() < 2


def test_lora_by_full_path_touches_no_tower_module_and_a_bad_target_is_one_line(world):
    vlm = copy.deepcopy(world.vlm)
    assert any('q_proj' in name for name, _ in vlm.tower.named_parameters())   # its last name would find these too
    lora(vlm.llm, r=4, alpha=8, dropout=0.0, targets=r'model\.layers\.\d+\.(self_attn\.q|mlp\.down)_proj')
    adapted = {name for name, m in vlm.named_modules() if hasattr(m, 'lora_A')}
    assert adapted == {'llm.model.layers.0.self_attn.q_proj', 'llm.model.layers.0.mlp.down_proj',
                       'llm.model.layers.1.self_attn.q_proj', 'llm.model.layers.1.mlp.down_proj'}
    vlm(world.loader.collate(world.mixed)).backward()
    reached = {name for name in names_with_gradient(vlm) if not name.startswith('connector.')}
    assert reached == {f'{name}.lora_B.default.weight' for name in adapted}    # B starts as zeros: A has none yet
    with pytest.raises(SystemExit) as e:
        lora(copy.deepcopy(world.vlm.llm), r=4, alpha=8, dropout=0.0, targets='nowhere')
    assert_one_line(e.value, "lora_targets = 'nowhere': ")


def test_lora_beside_half_weights_is_multiplied_in_half_and_gives_what_peft_gives(world):
    vlm = copy.deepcopy(world.vlm)
    vlm.llm.bfloat16()
    lora(vlm.llm, r=4, alpha=8, dropout=0.0, targets=r'model\.layers\.\d+\.mlp\.down_proj')
    peft = copy.deepcopy(vlm)
    for module in peft.llm.modules():
        if hasattr(module, 'cast_input_dtype_enabled'):
            module.cast_input_dtype_enabled = True     # as PEFT has it: to float32 and, by autocast, back
    dtypes = {}
    losses = {}
    for name, tried in ('ours', vlm), ('peft', peft):
        a = tried.llm.model.layers[1].mlp.down_proj.lora_A['default']
        a.register_forward_pre_hook(lambda _, args, name=name: dtypes.update({name: args[0].dtype}))
        losses[name] = tried(world.loader.collate(world.mixed))
        losses[name].backward()
    assert dtypes == {'ours': torch.bfloat16, 'peft': torch.float32}
    assert losses['ours'] == losses['peft']
    for (name, p), q in zip(vlm.named_parameters(), peft.parameters()):
        if '.lora_' in name:
            assert p.dtype == torch.float32 and torch.equal(p.grad, q.grad), name


# -----------------------------------------------------------------------------
# the ablation

def test_in_the_ablation_nobody_keeps_its_own_image_and_each_is_read_once(world, monkeypatch):
    asked = []
    given = []                                         # (ids of a batch, the image tokens under a condition)
    nll = world.vlm.nll

    def get_image(path):
        asked.append(path)
        return READ(path)

    def spy(batch, image_tokens):
        given.append((batch.ids, image_tokens))
        return nll(batch, image_tokens)

    monkeypatch.setattr(world.vlm, 'nll', spy)
    loader = Loader(get_image, 4, world.loader.bad_samples, workers=1)
    image_ablation(world.vlm, loader, world.captions, batch_size=5, seed=1)
    ids = [example.item.id for example in world.captions]
    paths = [path for example in world.captions for path in example.item.images]
    assert sorted(asked[1:]) == sorted(paths) and asked[0] == asked[-1]    # the first one's partner is the last
    with torch.no_grad():
        own = {example.item.id: world.vlm.image_tokens(loader.images([example]))[0] for example in world.captions}
    partners = {}
    for batch_ids, tokens in given[1::4]:              # shuffled, of correct, shuffled, zero, noise
        for id, row in zip(batch_ids, tokens):
            [partners[id]] = [other for other, image in own.items() if torch.allclose(row, image, atol=1e-6)]
    assert sorted(partners) == sorted(partners.values()) == sorted(ids)
    assert all(id != other for id, other in partners.items())


def test_the_ablation_is_the_same_for_any_batch_size_and_its_correct_losses_are_those_of_the_examples(world):
    four, sixteen = (image_ablation(world.vlm, world.loader, world.captions, size, seed=1) for size in (4, 16))
    assert list(four) == ['correct', 'shuffled', 'zero', 'noise']
    for condition, losses in four.items():
        assert losses.shape == (24,)
        np.testing.assert_allclose(losses, sixteen[condition], rtol=1e-5)
    with torch.no_grad():
        want = [losses_alone(world, example).sum().item() for example in world.captions]
    np.testing.assert_allclose(four['correct'], want, rtol=1e-5)
    for condition in 'shuffled', 'zero', 'noise':
        assert np.abs(four[condition] - four['correct']).max() > 0.01


@pytest.mark.parametrize('counts', [[1] * 5, [2, 1, 3, 1, 1], [3, 2], [4, 1, 1], [2] * 4])
def test_every_example_gets_as_many_images_of_others_as_it_has(counts):
    n = len(counts)
    taken = []
    for place in range(n):
        found = [(other % n, k) for other, k in images_before(counts, place)]
        assert len(found) == counts[place]
        assert all(other != place and k < counts[other] for other, k in found)
        taken += found
    if len(set(counts)) == 1:                          # a derangement of the images: each is given once
        assert len(set(taken)) == sum(counts)
    assert len(set(taken)) > n / 2


def test_the_ablation_of_several_images_is_the_same_for_any_batch_size_and_number_of_ranks(world, several, monkeypatch):
    one = image_ablation(world.vlm, world.loader, several, 4, seed=1)
    other = image_ablation(world.vlm, world.loader, several, 16, seed=1)
    counts = [len(example.image_starts) for example in several]
    order = np.random.default_rng(1).permutation(len(several)).tolist()
    for place, i in enumerate(order):
        paths = [several[order[k]].item.images[n] for k, n in images_before([counts[j] for j in order], place)]
        assert not set(paths) & set(several[i].item.images)
        with torch.no_grad():
            for condition, images in ('correct', several[i].item.images), ('shuffled', tuple(paths)):
                example = replace(several[i], item=replace(several[i].item, images=images))
                assert one[condition][i] == pytest.approx(losses_alone(world, example).sum().item(), rel=1e-5)
    for condition in one:
        np.testing.assert_allclose(one[condition], other[condition], rtol=1e-5)

    # two ranks, one after the other: each has its part of the examples and reads what stands before it
    tokens = world.vlm.image_tokens(world.loader.images(several)).detach()
    moments = token_moments([tokens], world.vlm.llm.config.hidden_size, 'cpu')
    parts = []
    monkeypatch.setattr(inference, 'token_moments', lambda *args: moments)
    monkeypatch.setattr(inference, 'all_gather', lambda losses: parts.append(losses) or parts)
    for rank in range(2):
        with contextlib.suppress(KeyError):            # the first one alone lacks the other's
            both = image_ablation(world.vlm, world.loader, several, 4, seed=1, rank=rank, world_size=2)
    for condition in one:
        np.testing.assert_allclose(both[condition], one[condition], rtol=1e-4)


def test_crossed_losses_of_two_images_are_those_of_each_text_under_both_of_another(world, several):
    members = [1, 2, 5]
    [table] = crossed_losses(world.vlm, world.loader, several, [members], batch_size=4)
    for i, images in enumerate(members):
        for j, text in enumerate(members):
            item = replace(several[text].item, images=several[images].item.images)
            with torch.no_grad():
                want = losses_alone(world, replace(several[text], item=item)).sum().item()
            assert table[i, j] == pytest.approx(want, rel=1e-5)


def test_crossed_losses_are_those_of_each_text_under_each_image(world):
    sets = [[3, 8, 1], [20, 0, 5]]
    crossed = crossed_losses(world.vlm, world.loader, world.captions, sets, batch_size=4)
    again = crossed_losses(world.vlm, world.loader, world.captions, sets, batch_size=9)
    assert crossed.shape == (2, 3, 3)
    np.testing.assert_allclose(crossed, again, rtol=1e-5)
    for table, members in zip(crossed, sets):
        for i, image in enumerate(members):
            for j, text in enumerate(members):
                item = replace(world.captions[text].item, images=world.captions[image].item.images)
                with torch.no_grad():
                    want = losses_alone(world, replace(world.captions[text], item=item)).sum().item()
                assert table[i, j] == pytest.approx(want, rel=1e-5)


def test_for_a_connector_that_is_fed_zeros_another_image_costs_exactly_nothing(world, monkeypatch):
    image_tokens = world.vlm.image_tokens
    monkeypatch.setattr(world.vlm, 'image_tokens', lambda images: image_tokens(torch.zeros_like(images)))
    losses = image_ablation(world.vlm, world.loader, world.captions, 8, seed=1)
    np.testing.assert_array_equal(losses['correct'], losses['shuffled'])
    assert np.abs(losses['correct'] - losses['zero']).max() > 0.01


def test_noise_has_the_mean_and_deviation_that_all_tokens_have_in_each_dimension():
    parts = [torch.tensor([[[1.0, 9.0], [3.0, 9.0]]]), torch.tensor([[[5.0, 9.0], [7.0, 9.0]]])]   # (1, 2, 2) each
    mean, std = token_moments(parts, 2, 'cpu')
    assert mean.tolist() == [4, 9]
    assert std.tolist() == pytest.approx([5 ** 0.5, 0])       # squares of -3, -1, 1 and 3 have the mean 5


def test_the_means_of_an_ablation_are_per_label_and_wins_per_example():
    losses = {'correct': np.array([2.0, 6.0, 30.0]), 'shuffled': np.array([4.0, 6.0, 33.0]),
              'zero': np.array([1.0, 5.0, 29.0]), 'noise': np.array([3.0, 7.0, 31.0])}
    counts = np.array([2, 4, 10])                      # 16 labels: one short example, one medium, one long
    crossed = np.array([[[1.0, 5.0], [2.0, 9.0]]])     # text 1 is likelier under the other image
    assert ablation_means(losses, counts, (2, 4), crossed) == pytest.approx({
        'share_removed': 1 - 38 / 43, 'input_recall_1': 0.5, 'input_recall_5': 1, 'input_median_rank': 1.5,
        'output_recall_1': 0, 'output_recall_5': 1, 'output_median_rank': 2, 'correct': 38 / 16, 'shuffled': 43 / 16,
        'zero': 35 / 16, 'noise': 41 / 16, 'short': 2 / 2, 'medium': 6 / 4, 'long': 30 / 10, 'win_shuffled': 2 / 3,
        'win_zero': 0, 'win_noise': 1})


# -----------------------------------------------------------------------------
# the feature cache

@pytest.fixture
def gallery(tmp_path):
    """Five image files, and a way to cache their features."""
    paths = [str(save_noise(tmp_path / f'{k}.png', seed=k)) for k in range(5)]
    fill = partial(cache_features, tmp_path / 'cache', read=READ, device='cpu', batch_size=2)
    folder = tmp_path / 'cache'
    return SimpleNamespace(paths=paths, fill=fill, folder=folder, files=lambda: sorted(folder.glob('*.npy')))


def test_cached_features_are_the_towers_and_a_second_call_does_not_run_it(world, gallery, monkeypatch):
    features = gallery.fill(world.vlm.tower, gallery.paths)
    assert sorted(features) == gallery.paths
    for path in gallery.paths:
        want = world.vlm.tower(torch.from_numpy(READ(path))[None])[0]
        assert features[path].dtype == np.float16
        assert torch.allclose(torch.from_numpy(features[path].astype(np.float32)), want, rtol=2e-3, atol=1e-4)
    monkeypatch.setattr(world.vlm.tower, 'forward', lambda pixels: pytest.fail('the tower ran again'))
    again = gallery.fill(world.vlm.tower, gallery.paths[::-1])
    assert all(np.array_equal(again[path], features[path]) for path in gallery.paths)
    assert len(gallery.files()) == 1


@torch.no_grad()
def test_the_cache_holds_every_image_of_an_example_once(world, several, gallery):
    twice = replace(several[1], item=replace(several[1].item, images=2 * several[1].item.images[:1]))
    chats = [*several, twice]
    features = gallery.fill(world.vlm.tower, Examples.of(chats).images())
    assert set(features) == {path for example in chats for path in example.item.images}
    batch = Loader(image_reader(READ, features), 4, world.loader.bad_samples).collate(chats)
    assert batch.images.shape == (sum(len(example.image_starts) for example in chats), *batch.images.shape[1:])
    assert torch.allclose(world.vlm.nll(batch), world.vlm.nll(world.loader.collate(chats)), atol=0.02)


def test_changed_image_bytes_another_layer_or_another_normalisation_give_another_file(tiny, world, gallery):
    before = gallery.fill(world.vlm.tower, gallery.paths)
    Image.new('RGB', (32, 32), 'red').save(gallery.paths[2])
    after = gallery.fill(world.vlm.tower, gallery.paths)
    changed = [not np.array_equal(before[path], after[path]) for path in gallery.paths]
    assert changed == [False, False, True, False, False]
    assert len(gallery.files()) == 2
    gallery.fill(load_tower(tiny / 'vision', -2), gallery.paths)
    assert len(gallery.files()) == 3
    gallery.fill(Tower(SiglipVisionModel.from_pretrained(tiny / 'vision'), mean=(0.1, 0.5, 0.5)), gallery.paths)
    assert len(gallery.files()) == 4


def test_an_unreadable_or_missing_image_is_left_out_of_the_cache(world, gallery):
    with open(gallery.paths[1], 'r+b') as f:
        f.truncate(300)
    for _ in range(2):                                 # when the file is made and when it is found
        features = gallery.fill(world.vlm.tower, [*gallery.paths, gallery.paths[0] + '.none'])
        assert sorted(features) == [gallery.paths[k] for k in (0, 2, 3, 4)]
    with pytest.raises(BadSample) as e:
        image_reader(READ, features)(gallery.paths[1])
    assert_one_line(e.value, gallery.paths[1])


@pytest.mark.parametrize('what, message', [
    ('a bit of the features', 'its sha256 is not that in'),
    ('a bit of the seal', 'its sha256 is not that of its content'),
    ('an empty seal', 'remove it and run stage A1 or A2 again'),
    ('another seal', 'its sha256 is not that in')])
def test_a_cache_that_has_changed_is_refused_and_without_its_seal_made_anew(world, gallery, what, message):
    want = {path: array.copy() for path, array in gallery.fill(world.vlm.tower, gallery.paths).items()}
    file, = gallery.files()
    seal = file.with_suffix('.json')
    if what == 'a bit of the features':
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    elif what == 'a bit of the seal':
        seal.write_text(seal.read_text().replace('"broken": []', '"broken": [3]'))
    elif what == 'an empty seal':
        seal.write_text('{}')
    else:
        write_sealed(seal, {})
    with pytest.raises(SystemExit) as e:
        gallery.fill(world.vlm.tower, gallery.paths)
    assert_one_line(e.value, file.parent, message)
    seal.unlink()
    again = gallery.fill(world.vlm.tower, gallery.paths)
    assert all(np.array_equal(again[path], want[path]) for path in want)


def test_a_full_disk_is_met_before_any_feature_is_made_and_leaves_nothing(world, gallery, monkeypatch):
    monkeypatch.setattr(world.vlm.tower, 'forward', lambda pixels: pytest.fail('the tower ran'))
    with no_file_larger_than(3000), pytest.raises(SystemExit) as e:    # five images take 5,120 bytes
        gallery.fill(world.vlm.tower, gallery.paths)
    assert_one_line(e.value, 'features-', '(File too large); set feature_cache to another folder')
    assert [path.suffix for path in gallery.folder.iterdir()] == ['.lock']


def test_a_finished_cache_is_read_without_a_lock_or_a_write(world, gallery, monkeypatch):
    """As on a disk that is mounted read-only."""
    want = gallery.fill(world.vlm.tower, gallery.paths)
    before = sorted(gallery.folder.iterdir())

    def refuse(*_, **__):
        raise PermissionError(30, 'Read-only file system')
    for name in 'one_process_at_a_time', 'write_features':
        monkeypatch.setattr(model, name, refuse)
    monkeypatch.setattr(type(gallery.folder), 'mkdir', refuse)
    again = gallery.fill(world.vlm.tower, gallery.paths)
    assert all(np.array_equal(again[path], want[path]) for path in want)
    assert sorted(gallery.folder.iterdir()) == before
    Image.new('RGB', (32, 32)).save(gallery.paths[0])
    with pytest.raises(SystemExit) as e:               # another one has to be written
        gallery.fill(world.vlm.tower, gallery.paths)
    assert_one_line(e.value, gallery.folder, '(Read-only file system); set feature_cache to another folder')


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('while_it', ['reads an image', 'waits for the lock', 'runs the tower'])
def test_a_signal_ends_the_caching_at_once_and_leaves_nothing_half(world, gallery, monkeypatch, while_it, number):
    noted = []
    handler = signal.signal(number, lambda *_: noted.append(1))        # as StopSignal does: only noted

    def kill(*args, **options):
        os.kill(os.getpid(), number)
        time.sleep(60)
    if while_it == 'reads an image':
        gallery.fill = partial(gallery.fill, read=kill)
    elif while_it == 'runs the tower':
        monkeypatch.setattr(world.vlm.tower, 'forward', kill)
    else:
        monkeypatch.setattr(model, 'one_process_at_a_time', kill)
    start = time.monotonic()
    try:
        with pytest.raises(SystemExit) as e:
            gallery.fill(world.vlm.tower, gallery.paths)
        assert_one_line(e.value, f'{signal.Signals(number).name} stopped this run')
        assert time.monotonic() - start < 10 and not noted
        assert {path.suffix for path in gallery.folder.iterdir()} <= {'.lock'}
        os.kill(os.getpid(), number)
        assert noted == [1]                            # the handler from before is back
    finally:
        signal.signal(number, handler)


def test_only_pictures_whose_bytes_are_new_go_through_the_tower(world, gallery, monkeypatch):
    seen = []
    forward = world.vlm.tower.forward
    monkeypatch.setattr(world.vlm.tower, 'forward', lambda pixels: seen.append(len(pixels)) or forward(pixels))
    gallery.fill(world.vlm.tower, gallery.paths[:3])
    moved = f'{gallery.paths[1]}.moved.png'
    Path(gallery.paths[1]).rename(moved)
    features = gallery.fill(world.vlm.tower, [*gallery.paths, moved])
    assert sum(seen) == 5 and sorted(features) == sorted({*gallery.paths, moved} - {gallery.paths[1]})
    want = forward(torch.from_numpy(READ(moved))[None])[0].to(torch.float16).numpy()
    assert np.array_equal(features[moved], want)


def test_a_later_start_reads_neither_the_pictures_nor_the_features(world, gallery, monkeypatch):
    """But for those that have another time or size."""
    gallery.fill(world.vlm.tower, gallery.paths)
    read = []
    for module, name in (examples, 'media_sha256'), (model, 'sha256_file'):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda path, real=real: read.append(str(path)) or real(path))
    gallery.fill(world.vlm.tower, gallery.paths)
    assert read == []
    [file] = gallery.files()
    for path in gallery.paths[2], file:
        os.utime(path, (1, 1))
    gallery.fill(world.vlm.tower, gallery.paths)
    assert set(read) == {gallery.paths[2], str(file)}  # the features again at each look, the picture once
    read.clear()
    file.touch()
    gallery.fill(world.vlm.tower, gallery.paths)
    assert gallery.paths[2] not in read


def test_a_cache_larger_than_it_may_be_is_not_made_and_says_so(world, gallery, capsys):
    gb = 5 * 2 * world.vlm.tower.side ** 2 * world.vlm.tower.width / 1e9
    assert gallery.fill(world.vlm.tower, gallery.paths, max_gb=0.99 * gb) is None and not gallery.folder.exists()
    assert 'the features of 5 pictures would take' in capsys.readouterr().out
    assert len(gallery.fill(world.vlm.tower, gallery.paths, max_gb=1.01 * gb)) == 5
    assert 'features of 5 of 5 pictures are not there yet' in capsys.readouterr().out


def fill_on_a_rank(gallery, tower, folder):
    """A rank's part: fills the cache; its own folder is on a disk of its own when folder has a place for the rank."""
    model.PART = 2
    rank, world_size, _ = init_ranks('cpu')
    folder = Path(str(folder).format(rank=rank))
    ran = []
    forward = tower.forward
    tower.forward = lambda pixels: ran.append(len(pixels)) or forward(pixels)
    features = cache_features(folder, tower, gallery.paths, read=READ, device='cpu', rank=rank, world_size=world_size)
    np.savez(gallery.folder.parent / f'rank_{rank}.npz', ran=sum(ran), **{Path(p).stem: features[p] for p in features})
    shutdown_ranks()
    return 0, ''


@pytest.mark.parametrize('folder, shares', [('shared', (3, 2)), ('disk_{rank}', (5, 5))])
def test_all_ranks_fill_a_cache_also_when_each_has_a_disk_of_its_own(world, gallery, folder, shares):
    folder = gallery.folder.parent / folder
    want = gallery.fill(world.vlm.tower, gallery.paths)
    assert on_two_ranks(fill_on_a_rank, gallery, world.vlm.tower, folder) == [0, 0]
    for rank, n_pictures in enumerate(shares):
        found = np.load(gallery.folder.parent / f'rank_{rank}.npz')
        assert found['ran'] == n_pictures
        for path in gallery.paths:
            assert np.allclose(found[Path(path).stem], want[path], rtol=2e-3, atol=1e-4)


def test_a_cache_of_no_images_is_empty(world, gallery):
    assert gallery.fill(world.vlm.tower, [gallery.paths[0] + '.none']) == {}


# -----------------------------------------------------------------------------
# generation

@pytest.fixture(scope='module')
def prompts():
    torch.manual_seed(1)
    return [torch.randn(n, 32) * 0.3 for n in (5, 1, 9)]


@torch.no_grad()
def test_greedy_generation_is_the_step_by_step_argmax_without_a_cache(world, prompts):
    found = generate(world.vlm.llm, prompts, 12, stop_ids=[])
    embedding = world.stock.get_input_embeddings().weight
    for embeds, ids in zip(prompts, found):
        want = []
        for _ in range(12):
            want.append(world.stock(inputs_embeds=embeds[None]).logits[0, -1].argmax().item())
            embeds = torch.cat([embeds, embedding[want[-1]][None]])
        assert ids == want
        assert len(set(ids)) > 3                       # a loop over one token would prove little


@pytest.mark.parametrize('sampling', [{}, {'temperature': 0.7, 'top_p': 0.9}])
def test_a_prompt_in_a_batch_continues_as_it_does_alone(world, prompts, sampling):
    options = {'max_new_tokens': 12, 'stop_ids': [], **sampling}
    together = generate(world.vlm.llm, prompts, seeds=[5, 6, 7], **options)
    for prompt, seed, ids in zip(prompts, (5, 6, 7), together):
        assert generate(world.vlm.llm, [prompt], seeds=[seed], **options) == [ids]
    others = generate(world.vlm.llm, prompts, seeds=[8, 9, 10], **options)
    assert (others == together) == (not sampling)


def test_a_text_ends_before_its_stop_id_and_the_others_go_on(world, prompts):
    free = generate(world.vlm.llm, prompts, 12, stop_ids=[])
    stop = next(token for token in free[0] if token not in free[2])
    stopped = generate(world.vlm.llm, prompts, 12, stop_ids=[stop, -1])
    assert stopped == [ids[:ids.index(stop)] if stop in ids else ids for ids in free]
    assert len(stopped[0]) < 12 == len(stopped[2])
    assert generate(world.vlm.llm, prompts, 0, stop_ids=[]) == [[], [], []]


@pytest.mark.parametrize('top_p, top_k, kept', [
    (1e-6, 0, {2}), (0.45, 0, {2}), (0.6, 0, {2, 0}), (0.81, 0, {2, 0, 1}), (1.0, 0, {2, 0, 1}),
    (1.0, 1, {2}), (1.0, 2, {2, 0}), (1.0, 9, {2, 0, 1})])
def test_top_p_keeps_the_smallest_set_that_reaches_it_and_top_k_the_likeliest(top_p, top_k, kept):
    logits = torch.tensor([[0.3, 0.2, 0.5]]).log()
    drawn = set()
    for seed in range(100):
        drawn.add(pick(logits, 1.0, top_p, [torch.Generator().manual_seed(seed)], top_k).item())
    assert drawn == kept


@torch.no_grad()
def test_a_cache_that_has_room_gives_what_one_that_copies_itself_gives(world, monkeypatch):
    monkeypatch.setattr(GrowingLayer, 'ROOM', 2)
    llm = world.vlm.llm
    ours, stock = (Continuation(llm, [torch.randn(n, 32, generator=torch.Generator().manual_seed(n)) for n in (3, 5)])
                   for _ in range(2))
    stock.cache = DynamicCache(config=llm.config)
    for _ in range(7):                                 # rooms fill up and are made anew
        state = ours.hidden()
        assert torch.equal(state, stock.hidden())
        for continuation in ours, stock:
            continuation.append(state)
    assert ours.cache.get_seq_length() == stock.cache.get_seq_length() == 11


def test_drawing_follows_the_probabilities_and_nothing_has_to_be_sorted(monkeypatch):
    logits = torch.tensor([0.3, 0.2, 0.0, 0.5]).log().repeat(4000, 1)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4000)]
    monkeypatch.setattr(torch.Tensor, 'sort', None)
    drawn = pick(logits, 1.0, 1.0, generators)
    shares = torch.bincount(drawn, minlength=4) / 4000
    assert shares[2] == 0 and (shares - torch.tensor([0.3, 0.2, 0.0, 0.5])).abs().max() < 0.03


def test_examples_are_completed_from_their_prompt_for_any_batch_size(world):
    prompts = [(example, int(example.label_positions[0])) for example in world.captions[:4]]
    prompts.append((world.mixed[2], 5))                # text without an image
    one, four = (complete_examples(world.vlm, world.loader, prompts, size, 6, stop_ids=[2]) for size in (1, 4))
    assert one == four
    assert all(len(ids) <= 6 for ids in one)
    example, length = prompts[3]
    tokens = world.vlm.image_tokens(world.loader.images([example]))
    embeds = world.vlm.embed(torch.from_numpy(example.ids[:length]).long(), torch.arange(1, 5), tokens)
    assert one[3] == generate(world.vlm.llm, [embeds.detach()], 6, stop_ids=[2])[0]


def test_the_pictures_of_a_batch_of_prompts_go_through_the_tower_at_once_and_each_once(world, monkeypatch):
    sizes = []
    image_tokens = world.vlm.image_tokens
    monkeypatch.setattr(world.vlm, 'image_tokens', lambda images: sizes.append(len(images)) or image_tokens(images))
    prompts = [(world.captions[k], 5) for k in (0, 1, 1, 2)]       # two answers about one picture
    complete_examples(world.vlm, world.loader, prompts, 4, 2, stop_ids=[2])
    assert sizes == [3]


def test_a_vision_chat_captions_and_answers_as_its_examples_are_completed(world, tiny):
    chat = VisionChat(world.vlm, tiny / 'llm', tiny / 'vision', max_seq_len=64)
    example = world.captions[0]
    tokens = chat.encode_image(example.item.images[0])
    caption_prompt = (example, int(example.label_positions[0]))
    turns = (('what is it', 'a dot'), ('and where', None))
    talk = world.template.chat(Item('talk', example.item.images, turns))
    ids = complete_examples(world.vlm, world.loader, [caption_prompt, (talk, len(talk))], 2, 8, [world.template.end])
    caption, answer = (text.strip() for text in chat.tokenizer.batch_decode(ids, skip_special_tokens=True))
    assert chat.reply(tokens, max_new_tokens=8) == caption
    assert chat.reply(tokens, turns, max_new_tokens=8) == answer
    with pytest.raises(SystemExit) as e:
        chat.reply(tokens, [('why ' * 64, None)])
    assert_one_line(e.value, 'longer than max_seq_len = 64')
