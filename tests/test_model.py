"""model.py: the tower, the connector, attention over unpadded rows, losses, ablation, cached features, generation."""
import copy
import json
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3ForCausalLM, SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

import model
from data import BadSample, Item, Ledger, Loader, Template, image_reader, lay_out, read_image, read_llava
from model import (Connector, Tower, cache_features, generate, image_ablation, label_losses, load_llm, load_tower,
                   load_vlm, short_attention)

SHAPE = {'num_image_tokens': 4, 'width': 16, 'depth': 2, 'heads': 2, 'vision_ln': True}
READ = partial(read_image, size=32, resample=3)


def one_line(error, *parts):
    """The message is one line and says all of this."""
    text = str(error)
    assert '\n' not in text
    assert [p for p in parts if str(p) not in text] == [], text


@pytest.fixture(scope='module')
def world(tiny, tmp_path_factory):
    """A VLM of the tiny models, a stock Qwen3 of the same weights, and 24 captions and 2 chats as rows."""
    torch.manual_seed(0)
    vlm = load_vlm(tiny / 'llm', tiny / 'vision', SHAPE)
    with torch.no_grad():                              # large enough that every token and every image moves the losses
        for p in [*vlm.llm.parameters(), *vlm.tower.parameters(), vlm.connector.projector[2].weight]:
            if p.ndim >= 2:
                p.normal_(std=0.3)
    stock = Qwen3ForCausalLM.from_pretrained(tiny / 'llm', attn_implementation='sdpa').eval()
    stock.load_state_dict(vlm.llm.state_dict())
    template = Template(AutoTokenizer.from_pretrained(tiny / 'llm'), 4, 256)
    ledger = Ledger(tmp_path_factory.mktemp('world') / 'bad.jsonl', 0)
    items, talks = (read_llava(tiny / kind / 'data.json', tiny / kind / 'images', ledger)
                    for kind in ('captions', 'instruct'))
    captions, chats = [template.caption(item) for item in items[:24]], [template.chat(item) for item in talks[:2]]
    load = Loader(captions, image_reader(READ), 4, ledger)
    text_only = template.chat(Item('text', None, (('why', 'a red dot'), ('and', 'no'))))
    mixed = [captions[0], chats[0], text_only, chats[1]]
    return SimpleNamespace(vlm=vlm, stock=stock, load=load, captions=captions, mixed=mixed)


def alone(world, row):
    """Loss of each label of one row through the stock model, with logits of the whole vocabulary at every position."""
    ids = torch.from_numpy(row.ids.astype(np.int64))
    embeds = world.stock.get_input_embeddings()(ids).clone()
    if row.image_at >= 0:
        pixels = torch.from_numpy(READ(row.item.image))
        embeds[row.image_at:row.image_at + 4] = world.vlm.image_tokens(pixels[None])[0]
    logits = world.stock(inputs_embeds=embeds[None]).logits[0]
    return F.cross_entropy(logits[row.labelled - 1], ids[row.labelled.astype(np.int64)], reduction='none')


# -----------------------------------------------------------------------------
# loading

def save_noise(path, shape, seed=0):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)


@pytest.fixture
def picture(tmp_path):
    save_noise(tmp_path / 'a.png', (40, 56, 3))
    return tmp_path / 'a.png'


def stock_tower(tiny):
    return SiglipVisionModel.from_pretrained(tiny / 'vision').eval()


@torch.no_grad()
def test_the_tower_gives_what_the_stock_processor_and_model_give(tiny, picture):
    processor = SiglipImageProcessorPil.from_pretrained(tiny / 'vision')
    with Image.open(picture) as image:
        pixels = processor(image, return_tensors='pt')['pixel_values']
    tower, stock = load_tower(tiny / 'vision'), stock_tower(tiny)
    ours = torch.from_numpy(READ(picture))[None]
    assert torch.allclose((ours - tower.mean) / tower.std, pixels, atol=1e-6)
    found = tower(ours)
    assert found.shape == (1, 16, 32)                  # (32 / 8) ** 2 patches: no class token
    assert torch.allclose(found, stock(pixels).last_hidden_state, atol=1e-5)


@torch.no_grad()
def test_tower_layer_minus_two_is_what_the_last_block_got(tiny, picture):
    stock, ours = stock_tower(tiny), torch.from_numpy(READ(picture))[None]
    hidden = stock(ours / 127.5 - 1, output_hidden_states=True).hidden_states
    assert len(hidden) == 3                            # after the embeddings, after block 1, after block 2
    found = load_tower(tiny / 'vision', layer=-2)(ours)
    assert torch.allclose(found, hidden[1], atol=1e-5)
    assert not torch.allclose(found, load_tower(tiny / 'vision')(ours), atol=1e-2)


@pytest.mark.parametrize('layer', [-3, 0, 1])
def test_a_tower_layer_that_is_not_there_is_refused(tiny, layer):
    with pytest.raises(SystemExit) as e:
        load_tower(tiny / 'vision', layer)
    one_line(e.value, f'tower_layer = {layer}', 'wanted -2 to -1')


def test_pixels_are_normalised_with_the_mean_and_deviation_of_the_preprocessor_config(tiny, tmp_path):
    tower = load_tower(tiny / 'vision')
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    assert ((pixels - tower.mean) / tower.std).flatten().tolist() == pytest.approx([-1, -0.6, 1])
    change(tiny, tmp_path, 'vision', 'preprocessor_config.json', image_mean=[0.1, 0.2, 0.3], image_std=[0.2, 0.4, 0.7])
    tower = load_tower(tmp_path / 'vision')
    assert ((pixels - tower.mean) / tower.std).flatten().tolist() == pytest.approx([-0.5, 0, 1])


def change(tiny, folder, kind, file='config.json', **values):
    """A copy of a tiny model with other values in one of its JSON files."""
    shutil.copytree(tiny / kind, folder / kind)
    (folder / kind / file).write_text(json.dumps({**json.loads((folder / kind / file).read_text()), **values}))


def edit_weights(tiny, folder, kind, edit):
    """A copy of a tiny model whose weights went through edit({name: tensor})."""
    shutil.copytree(tiny / kind, folder / kind)
    weights = load_file(folder / kind / 'model.safetensors')
    edit(weights)
    save_file(weights, folder / kind / 'model.safetensors', metadata={'format': 'pt'})


LOADERS = {'llm': (load_llm, 'model.layers.1.mlp.up_proj.weight'),       # and the name of one weight
           'vision': (load_tower, 'vision_model.encoder.layers.1.mlp.fc1.weight')}


@pytest.mark.parametrize('kind', LOADERS)
def test_a_model_with_missing_weights_is_refused(tiny, tmp_path, kind):
    load, name = LOADERS[kind]
    edit_weights(tiny, tmp_path, kind, lambda weights: weights.pop(name))
    with pytest.raises(SystemExit) as e:
        load(tmp_path / kind)
    one_line(e.value, tmp_path / kind, 'lacks weights', name.removeprefix('vision_model.'))


@pytest.mark.parametrize('kind', LOADERS)
def test_a_model_with_unknown_weights_is_refused(tiny, tmp_path, kind):
    edit_weights(tiny, tmp_path, kind, lambda weights: weights.update(stranger=torch.zeros(1)))
    with pytest.raises(SystemExit) as e:
        LOADERS[kind][0](tmp_path / kind)
    one_line(e.value, tmp_path / kind, 'has unknown weights', 'stranger')


@pytest.mark.parametrize('kind', LOADERS)
def test_a_model_with_misshapen_weights_is_refused(tiny, tmp_path, kind):
    load, name = LOADERS[kind]
    edit_weights(tiny, tmp_path, kind, lambda weights: weights.update({name: torch.zeros(3, 3)}))
    with pytest.raises(SystemExit) as e:
        load(tmp_path / kind)
    one_line(e.value, tmp_path / kind, 'misshapen', name.removeprefix('vision_model.'))


@pytest.mark.parametrize('keep', [1000, 0])
@pytest.mark.parametrize('kind', LOADERS)
def test_a_model_with_a_cut_or_missing_weight_file_is_refused_with_one_line(tiny, tmp_path, kind, keep):
    shutil.copytree(tiny / kind, tmp_path / kind)
    file = tmp_path / kind / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:keep])
    if not keep:
        file.unlink()
    with pytest.raises(SystemExit) as e:
        LOADERS[kind][0](tmp_path / kind)
    one_line(e.value, tmp_path / kind)


@pytest.mark.parametrize('kind, other', [('llm', 'llama'), ('llm', 'zzz'), ('vision', 'clip'), ('vision', 'siglip2')])
def test_a_model_of_another_type_is_refused_with_one_line(tiny, tmp_path, kind, other):
    change(tiny, tmp_path, kind, model_type=other)
    with pytest.raises(SystemExit) as e:
        LOADERS[kind][0](tmp_path / kind)
    one_line(e.value, tmp_path / kind, other)


@pytest.mark.parametrize('kind', LOADERS)
def test_a_folder_that_is_not_there_is_refused_with_one_line(tmp_path, kind):
    with pytest.raises(SystemExit) as e:
        LOADERS[kind][0](tmp_path / 'none')
    one_line(e.value, tmp_path / 'none')


# -----------------------------------------------------------------------------
# real sizes, without their weights

@pytest.mark.parametrize('llm_width, parameters', [(4096, 82_444_800), (1024, 13_223_424)])      # Qwen3-8B and 0.6B
def test_the_connector_has_the_right_size_for_so400m_and_real_llms(llm_width, parameters):
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
    print(f'connector for D = {llm_width}: {sum(p.numel() for p in connector.parameters()):,} parameters')
    assert sum(p.numel() for p in connector.parameters()) == parameters


# -----------------------------------------------------------------------------
# attention over unpadded rows, and the loss

@torch.no_grad()
def test_a_batch_of_unpadded_rows_gives_the_losses_that_each_row_gives_alone(world):
    batch = world.load.collate(world.mixed)
    assert len({len(r) for r in world.mixed}) == 4     # four lengths: filled-up places are there to go wrong
    losses = world.vlm.nll(batch)
    want = torch.cat([alone(world, row) for row in world.mixed])
    assert torch.allclose(losses, want, atol=1e-5, rtol=1e-5)
    one_row = replace(batch, rows=lay_out([len(batch.input_ids)]))
    assert (world.vlm.nll(one_row) - want).abs().max() > 0.1      # were rows to see each other, this would tell


@torch.no_grad()
def test_rows_laid_out_in_groups_and_attention_by_its_definition_change_nothing(world):
    batch, lengths = world.load.collate(world.mixed), [len(r) for r in world.mixed]
    want, grouped = world.vlm.nll(batch), world.vlm.nll(replace(batch, rows=lay_out(lengths, together=2)))
    assert torch.allclose(grouped, want, atol=1e-5, rtol=1e-5)
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    stock = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(short_attention(q, k, v), stock, atol=1e-6)


@torch.no_grad()
def test_in_bf16_on_a_cpu_rows_keep_apart_and_losses_stay_near_those_of_float32(world):
    batch, starts = world.load.collate(world.mixed), np.cumsum([0, *map(len, world.mixed)])
    images, half = world.vlm.image_tokens(batch.images), copy.deepcopy(world.vlm)
    half.llm.bfloat16()
    losses, ids = half.nll(batch, images), batch.input_ids.clone()
    whole = world.vlm.nll(batch, images)
    assert not torch.equal(losses, whole) and torch.allclose(losses, whole, rtol=0.05)   # of about 9 nats each
    assert (losses.mean() / whole.mean() - 1).abs() < 0.01
    ids[starts[1]:starts[2]] //= 2
    changed = half.nll(replace(batch, input_ids=ids), images)
    others = batch.label_rows != 1
    assert torch.equal(losses[others], changed[others]) and (losses[~others] != changed[~others]).any()


@torch.no_grad()
@pytest.mark.parametrize('changed', range(4))
def test_changing_one_row_changes_no_other_rows_loss_by_one_bit(world, changed):
    batch = world.load.collate(world.mixed)
    starts = np.cumsum([0, *map(len, world.mixed)])
    images = world.vlm.image_tokens(batch.images)
    before, ids = world.vlm.nll(batch, images), batch.input_ids.clone()
    ids[starts[changed]:starts[changed + 1]] //= 2
    after = world.vlm.nll(replace(batch, input_ids=ids), images)
    others = batch.label_rows != changed
    assert torch.equal(before[others], after[others])
    assert (before[~others] != after[~others]).any()


def test_no_gradient_flows_from_one_rows_loss_to_another_rows_image(world):
    rows = world.captions[:3]
    batch = world.load.collate(rows)
    images = world.vlm.image_tokens(batch.images).detach().requires_grad_()
    world.vlm.nll(batch, images)[batch.label_rows == 1].sum().backward()
    assert [bool(g.any()) for g in images.grad] == [False, True, False]


@pytest.mark.parametrize('chunk', [1, 3, 7])
def test_losses_in_chunks_are_the_losses_at_once_with_the_same_gradient(chunk):
    torch.manual_seed(0)
    head, hidden, labels = torch.nn.Linear(8, 50), torch.randn(10, 8, requires_grad=True), torch.randint(50, (10,))
    found = []
    for size in 2048, chunk:
        losses = label_losses(hidden, head, labels, size)
        grads = torch.autograd.grad((losses * torch.arange(10)).sum(), [hidden, *head.parameters()])
        found.append([losses, *grads])
    want = F.cross_entropy(head(hidden), labels, reduction='none')
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found)) and torch.allclose(found[0][0], want)


@torch.no_grad()
def test_image_tokens_land_on_the_pads_and_nowhere_else(world):
    batch, pad = world.load.collate(world.mixed), world.captions[0].ids[1]
    tokens = torch.randn(3, 4, 32)                     # three of the four rows have an image
    embeds = world.vlm.embed(batch.input_ids, batch.image_positions, tokens)
    pads = batch.input_ids == pad
    assert pads.sum() == 12 and torch.equal(embeds[pads], tokens.flatten(0, 1))
    assert torch.equal(embeds[~pads], world.vlm.llm.get_input_embeddings()(batch.input_ids)[~pads])


def test_the_gradient_reaches_every_connector_parameter_and_no_frozen_one(world):
    world.vlm.zero_grad(set_to_none=True)
    world.vlm(world.load.collate(world.mixed)).backward()
    reached = {n for n, p in world.vlm.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {f'connector.{n}' for n, _ in world.vlm.connector.named_parameters()}
    assert 'connector.vision_ln.weight' in reached
    assert not any(p.requires_grad for part in (world.vlm.tower, world.vlm.llm) for p in part.parameters())
    world.vlm.zero_grad(set_to_none=True)


def test_train_leaves_the_frozen_parts_in_eval_mode(world):
    vlm = world.vlm
    try:
        assert vlm.train() is vlm and vlm.training and vlm.connector.training
        assert not any(m.training for part in (vlm.tower, vlm.llm) for m in part.modules())
        next(vlm.llm.parameters()).requires_grad_(True)
        assert vlm.train().llm.training and not vlm.tower.training
        assert not any(m.training for m in vlm.eval().modules())
    finally:
        next(vlm.llm.parameters()).requires_grad_(False)
        vlm.eval()


def test_with_frozen_weights_in_bf16_the_connector_learns_in_float32(tiny, world):
    torch.manual_seed(0)
    half = load_vlm(tiny / 'llm', tiny / 'vision', SHAPE, dtype=torch.bfloat16)
    torch.manual_seed(0)
    full = load_vlm(tiny / 'llm', tiny / 'vision', SHAPE)
    batch = world.load.collate(world.mixed)
    losses, want = half.nll(batch), full.nll(batch)
    losses.sum().backward()
    assert losses.dtype == torch.float32 and (losses - want).abs().mean() < 0.02 * want.mean()
    assert {p.grad.dtype for p in half.connector.parameters()} == {torch.float32}
    assert {p.dtype for part in (half.tower, half.llm) for p in part.parameters()} == {torch.bfloat16}


def test_image_tokens_start_at_the_size_of_the_llms_embeddings(tiny, world):
    torch.manual_seed(0)
    vlm = load_vlm(tiny / 'llm', tiny / 'vision', SHAPE)
    tokens = vlm.image_tokens(world.load.images(world.captions))
    ratio = tokens.square().mean() / vlm.llm.get_input_embeddings().weight.square().mean()
    assert 0.5 < ratio.sqrt() < 2


def test_lora_by_full_path_touches_no_tower_module(tiny, world):
    vlm = load_vlm(tiny / 'llm', tiny / 'vision', SHAPE)
    names = [n for n, _ in vlm.tower.named_parameters()]
    assert any('q_proj' in n for n in names)           # a target by its last name would find these
    targets = r'model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)'
    get_peft_model(vlm.llm, LoraConfig(r=4, target_modules=targets, task_type='CAUSAL_LM'))
    adapted = {n for n, m in vlm.named_modules() if hasattr(m, 'lora_A')}
    assert adapted == {f'llm.model.layers.{layer}.{module}' for layer in range(2) for module in (
        'self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj', 'self_attn.o_proj',
        'mlp.gate_proj', 'mlp.up_proj', 'mlp.down_proj')}
    assert [n for n, _ in vlm.tower.named_parameters()] == names
    vlm(world.load.collate(world.mixed)).backward()
    reached = {n for n, p in vlm.named_parameters() if p.grad is not None and p.grad.any()}
    assert len([n for n in reached if 'lora_B' in n]) == 14 and not any(n.startswith('tower.') for n in reached)


# -----------------------------------------------------------------------------
# the ablation

def test_in_the_ablation_nobody_keeps_its_own_image(world):
    asked, load = [], Loader(world.captions, world.load.get_image, 4, world.load.ledger)
    give = load.images
    load.images = lambda rows: asked.append([r.item.id for r in rows]) or give(rows)
    image_ablation(world.vlm, load, 5, seed=1)
    own, others = sum(asked[:5], []), sum(asked[5:], [])          # 24 rows, five batches: first their own, then others
    assert own == [r.item.id for r in world.captions]
    assert sorted(own) == sorted(others) and all(a != b for a, b in zip(own, others))


def test_the_ablation_is_the_same_for_any_batch_size_and_its_correct_losses_are_those_of_the_rows(world):
    four, sixteen = (image_ablation(world.vlm, world.load, size, seed=1) for size in (4, 16))
    assert list(four) == ['correct', 'shuffled', 'zero', 'noise']
    for condition, losses in four.items():
        assert losses.shape == (24,)
        np.testing.assert_allclose(losses, sixteen[condition], rtol=1e-5)
    with torch.no_grad():
        want = [alone(world, row).sum().item() for row in world.captions]
    np.testing.assert_allclose(four['correct'], want, rtol=1e-5)
    for condition in 'shuffled', 'zero', 'noise':
        assert np.abs(four[condition] - four['correct']).max() > 0.01


def test_for_a_connector_that_is_fed_zeros_another_image_costs_exactly_nothing(world, monkeypatch):
    see = world.vlm.image_tokens
    monkeypatch.setattr(world.vlm, 'image_tokens', lambda images: see(torch.zeros_like(images)))
    losses = image_ablation(world.vlm, world.load, 8, seed=1)
    np.testing.assert_array_equal(losses['correct'], losses['shuffled'])
    assert np.abs(losses['correct'] - losses['zero']).max() > 0.01


# -----------------------------------------------------------------------------
# the feature cache

@pytest.fixture
def gallery(tmp_path, world):
    """Five pictures, and a way to cache their features."""
    for k in range(5):
        save_noise(tmp_path / f'{k}.png', (32, 32, 3), k)
    paths = [str(tmp_path / f'{k}.png') for k in range(5)]
    fill = partial(cache_features, tmp_path / 'cache', read=READ, device='cpu', batch_size=2)
    return SimpleNamespace(paths=paths, fill=fill, files=lambda: sorted((tmp_path / 'cache').glob('*.npy')))


def test_cached_features_are_the_towers_and_a_second_call_does_not_run_it(world, gallery, monkeypatch):
    features = gallery.fill(world.vlm.tower, gallery.paths)
    assert sorted(features) == gallery.paths
    for path in gallery.paths:
        want = world.vlm.tower(torch.from_numpy(READ(path))[None])[0]
        assert features[path].dtype == np.float16
        assert torch.allclose(torch.from_numpy(features[path].astype(np.float32)), want, rtol=2e-3, atol=1e-4)

    def fails(pixels):
        raise AssertionError('the tower ran again')
    monkeypatch.setattr(world.vlm.tower, 'forward', fails)
    again = gallery.fill(world.vlm.tower, gallery.paths[::-1])
    assert all(np.array_equal(again[path], features[path]) for path in gallery.paths)
    assert len(gallery.files()) == 1


def test_changed_image_bytes_or_another_tower_layer_give_another_file(tiny, world, gallery):
    before = gallery.fill(world.vlm.tower, gallery.paths)
    Image.new('RGB', (32, 32), 'red').save(gallery.paths[2])
    after = gallery.fill(world.vlm.tower, gallery.paths)
    changed = [not np.array_equal(before[path], after[path]) for path in gallery.paths]
    assert changed == [False, False, True, False, False] and len(gallery.files()) == 2
    gallery.fill(load_tower(tiny / 'vision', -2), gallery.paths)
    assert len(gallery.files()) == 3


def test_another_normalisation_gives_another_file(tiny, world, gallery):
    stock = stock_tower(tiny)
    one = gallery.fill(Tower(stock, mean=(0.5, 0.5, 0.5)), gallery.paths)
    other = gallery.fill(Tower(stock, mean=(0.1, 0.5, 0.5)), gallery.paths)
    assert not np.array_equal(one[gallery.paths[0]], other[gallery.paths[0]])


def test_an_unreadable_or_missing_image_is_left_out_of_the_cache(world, gallery):
    with open(gallery.paths[1], 'r+b') as f:
        f.truncate(300)
    for _ in range(2):                                 # when the file is made and when it is found
        features = gallery.fill(world.vlm.tower, [*gallery.paths, gallery.paths[0] + '.none'])
        assert sorted(features) == [gallery.paths[k] for k in (0, 2, 3, 4)]
    row = replace(world.captions[0], item=Item('bad', gallery.paths[1], ()))
    with pytest.raises(BadSample) as e:
        image_reader(READ, features)(row)
    one_line(e.value, gallery.paths[1])


# -----------------------------------------------------------------------------
# generation

@pytest.fixture(scope='module')
def prompts():
    torch.manual_seed(1)
    return [torch.randn(n, 32) * 0.3 for n in (5, 1, 9)]


@torch.no_grad()
def test_greedy_generation_is_the_step_by_step_argmax_without_a_cache(world, prompts):
    found = generate(world.vlm.llm, prompts, 12, stop_ids=[])
    for prompt, ids in zip(prompts, found):
        embeds, want = prompt, []
        for _ in range(12):
            want.append(world.stock(inputs_embeds=embeds[None]).logits[0, -1].argmax().item())
            embeds = torch.cat([embeds, world.stock.get_input_embeddings().weight[want[-1]][None]])
        assert ids == want
        assert len(set(ids)) > 3                       # a loop over one token would prove little


@pytest.mark.parametrize('temperature, top_p', [(0.0, 1.0), (1.0, 1.0), (0.7, 0.9)])
def test_a_row_in_a_batch_padded_on_the_left_continues_as_it_does_alone(world, prompts, temperature, top_p):
    how = {'max_new_tokens': 12, 'stop_ids': [], 'temperature': temperature, 'top_p': top_p}
    together = generate(world.vlm.llm, prompts, seeds=[5, 6, 7], **how)
    assert together == [generate(world.vlm.llm, [p], seeds=[s], **how)[0] for p, s in zip(prompts, (5, 6, 7))]
    others = generate(world.vlm.llm, prompts, seeds=[8, 9, 10], **how)
    assert (others == together) == (temperature == 0)


def test_a_row_ends_before_its_stop_id_and_the_others_go_on(world, prompts):
    free = generate(world.vlm.llm, prompts, 12, stop_ids=[])
    stop = next(token for token in free[0] if token not in free[2])
    stopped = generate(world.vlm.llm, prompts, 12, stop_ids=[stop, -1])
    assert stopped == [ids[:ids.index(stop)] if stop in ids else ids for ids in free]
    assert len(stopped[0]) < 12 == len(stopped[2])


@pytest.mark.parametrize('n', [0, 1, 7])
def test_no_more_than_max_new_tokens_are_made(world, prompts, n):
    assert [len(ids) for ids in generate(world.vlm.llm, prompts, n, stop_ids=[])] == [n] * 3


def test_sampling_with_a_tiny_top_p_is_greedy(world, prompts):
    greedy = generate(world.vlm.llm, prompts, 12, stop_ids=[])
    assert generate(world.vlm.llm, prompts, 12, [], temperature=1.0, top_p=1e-6, seeds=[1, 2, 3]) == greedy


@pytest.mark.parametrize('top_p, kept', [(0.45, {2}), (0.6, {2, 0}), (0.81, {2, 0, 1}), (1.0, {2, 0, 1})])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    logits = torch.tensor([[0.3, 0.2, 0.5]]).log()
    drawn = [model.pick(logits, 1.0, top_p, [torch.Generator().manual_seed(s)]).item() for s in range(100)]
    assert set(drawn) == kept


def test_rows_are_completed_from_their_prompt_for_any_batch_size(world):
    prompts = [(row, int(row.labelled[0])) for row in world.captions[:5]]
    one, four = (model.complete_rows(world.vlm, world.load, prompts, size, 6, [2]) for size in (1, 4))
    assert one == four and [len(ids) <= 6 for ids in one] == [True] * 5
    row, length = prompts[3]
    tokens = world.vlm.image_tokens(world.load.images([row]))
    embeds = world.vlm.embed(torch.from_numpy(row.ids[:length]).long(), torch.arange(1, 5), tokens)
    assert one[3] == generate(world.vlm.llm, [embeds.detach()], 6, [2])[0]
