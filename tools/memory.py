"""
How much memory of a GPU a training step takes: a formula over the real shapes, nothing is loaded or downloaded.

reads   nothing for the base models it knows (KNOWN); of another one its config
writes  the parts and their sum, in GiB; with --table_only=True the table of docs/bigger.md
done    at once

$ python -m tools.memory --stage=a1 --llm=Qwen/Qwen3-8B --batch_size=8
$ python -m tools.memory --stage=b4 --llm=Qwen/Qwen3-0.6B --batch_size=8 --row_tokens=1100 --labels=20 --codes=1001
$ python -m tools.memory --table_only=True

Letters: d LLM width, i width inside its MLP, q and k widths of all its queries and of all its keys, n learned numbers,
e bytes of a number in the precision of the frozen weights.
"""
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from configure import configure
from model import Connector, Tower, load_config

KNOWN = {                                              # as published; the text rows are 151,936 in both
    'Qwen/Qwen3-8B': {
        'hidden_size': 4096, 'intermediate_size': 12288, 'num_hidden_layers': 36, 'num_attention_heads': 32,
        'num_key_value_heads': 8, 'head_dim': 128, 'tie_word_embeddings': False, 'vocab_size': 151_936},
    'Qwen/Qwen3-0.6B': {
        'hidden_size': 1024, 'intermediate_size': 3072, 'num_hidden_layers': 28, 'num_attention_heads': 16,
        'num_key_value_heads': 8, 'head_dim': 128, 'tie_word_embeddings': True, 'vocab_size': 151_936},
    'google/siglip2-so400m-patch14-384': {
        'hidden_size': 1152, 'intermediate_size': 4304, 'num_hidden_layers': 27, 'num_attention_heads': 16,
        'image_size': 384, 'patch_size': 14}}
LORA = r'model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)'
CHUNK = 2048                                           # labels whose logits exist at a time: label_losses
GIB = 2 ** 30


def known_config(name, cls):
    """The config of a base model, by a name in KNOWN, a folder or a name on the hub."""
    if name in KNOWN:
        return cls(**KNOWN[name])
    found = load_config(name)
    found = getattr(found, 'vision_config', found) if cls is SiglipVisionConfig else found
    if not isinstance(found, cls):
        raise SystemExit(f'{name}: model_type is {found.model_type!r}, wanted that of a {cls.__name__}')
    return found


def count(parameters):
    return sum(p.numel() for p in parameters)


def memory_needed(stage, llm, tower=None, batch_size=16, row_tokens=128, labels=40, codes=0, code_range=0, new_rows=0,
                  num_image_tokens=64, width=512, depth=2, heads=8, vision_ln=False, tower_layer=-1, lora_r=16,
                  lora_dropout=0.05, full_tune=False, ranks=1, half=True, cuda=True):
    """Bytes on one GPU, {part: bytes}; 'peak' is their largest sum. Everything is counted on the meta device.

    stage: a1, a2, b3 or b4. llm, tower: configs of the base models, tower for Track A. Each of batch_size rows has
    row_tokens tokens, of which `labels` are text to predict and `codes` are codes to predict, from a range of
    code_range ids. half: frozen weights in bfloat16, else all in float32. cuda: dropout keeps a byte a number there,
    and four on a CPU.

    Kept for the backward pass: attention is fused (no T x T matrix), rows are of like length (the micro-batch's are),
    and of a frozen layer only what its own backward needs, no inputs of its matrices.
    """
    e, tokens, grafted = 2 if half else 4, batch_size * row_tokens, stage in ('a1', 'a2')
    lora = stage == 'a2' or stage == 'b4' and not full_tune
    with torch.device('meta'):
        model = Qwen3ForCausalLM(llm).requires_grad_(False)
        parts = {'llm': model}
        if grafted:
            parts['tower'] = Tower(SiglipVisionModel(tower), tower_layer)
            parts['connector'] = Connector(tower.hidden_size, parts['tower'].side, llm.hidden_size, num_image_tokens,
                                           width, depth, heads, vision_ln)
        else:
            parts['rows'] = nn.ParameterList(nn.Parameter(torch.empty(new_rows, llm.hidden_size)) for _ in range(2))
        if lora:
            get_peft_model(model, LoraConfig(r=lora_r, target_modules=LORA))
        if full_tune:
            model.model.layers.requires_grad_(True), model.model.norm.requires_grad_(True)
    every = [p for part in parts.values() for p in part.parameters()]
    learned = [p for p in every if p.requires_grad]
    n, largest = count(learned), max(p.numel() for p in learned)

    # the language model, a layer and a token
    d, i, q = llm.hidden_size, llm.intermediate_size, llm.num_attention_heads * llm.head_dim
    k = llm.num_key_value_heads * llm.head_dim
    layer = 4 * (2 * d + q + k) + e * (2 * q + 2 * k + 3 * i)          # what is normed; q, k, v, out; gate, up, product
    inputs = 5 * d + q + i                             # of its seven matrices, each in a cast or a dropout of its own
    if lora:
        layer += inputs * (e + (1 if cuda else 4) * (lora_dropout > 0)) + 7 * lora_r * e
    if full_tune:
        layer += e * (inputs + 2 * d + q + k)
    activations = tokens * (llm.num_hidden_layers * layer + 4 * d)     # and the last norm
    if grafted:
        patches, seen = parts['tower'].side ** 2, parts['tower'].side ** 2 + num_image_tokens
        one = patches * (e * tower.hidden_size + 4 * width + 4 * vision_ln * tower.hidden_size)
        one += depth * width * (3 * e * seen + num_image_tokens * (8 + 12 * e))
        activations += batch_size * (one + num_image_tokens * (width * (4 + e) + 8 * llm.hidden_size * e))
    if half:
        activations += 2 * (n - (parts['rows'][0].numel() if not grafted else 0))   # casts of what is multiplied by
    at_once = [(min(m, CHUNK), size) for m, size in (
        (batch_size * labels, llm.vocab_size), (batch_size * codes, code_range)) if m]
    logits = 4 * sum(m * size for m, size in at_once)                  # log probabilities in float32

    need = {'frozen': e * (count(every) - n), 'trained': 4 * n, 'gradients': 4 * n, 'optimizer': 8 * n,
            'activations': activations, 'logits': logits}
    backward = max((m * size for m, size in at_once), default=0) * (4 + 2 * half) + 4 * largest   # one range at a time
    after = max(16 * largest, 4 * n * (ranks > 1))     # the norm in float64, one matrix at a time; the ranks' message
    still = sum(need[part] for part in ('frozen', 'trained', 'gradients', 'optimizer'))
    return {**need, 'peak': still + max(activations + logits + backward, after)}


def gib(size):
    return f'{size / GIB:.1f}'


A2 = {'row_tokens': 1024, 'labels': 400}
B = {'row_tokens': 1100, 'labels': 20, 'codes': 1001, 'code_range': 16_384, 'new_rows': 32_772, 'lora_r': 64}
PLAN = [                                               # the table of docs/bigger.md: machine, stage, base, how
    ('24 GiB', 'a1', 'Qwen3-0.6B', {'batch_size': 32}),
    ('24 GiB', 'a2', 'Qwen3-0.6B', {'batch_size': 4, **A2}),
    ('24 GiB', 'b3', 'Qwen3-0.6B', {'batch_size': 8, **B}),
    ('24 GiB', 'b4', 'Qwen3-0.6B', {'batch_size': 4, **B}),
    ('24 GiB', 'a1', 'Qwen3-8B', {'batch_size': 4}),
    ('24 GiB', 'a2', 'Qwen3-8B', {'batch_size': 1, **A2}),
    ('139 GiB', 'a1', 'Qwen3-8B', {'batch_size': 64}),
    ('139 GiB', 'a2', 'Qwen3-8B', {'batch_size': 8, **A2}),
    ('139 GiB', 'b3', 'Qwen3-8B', {'batch_size': 16, **B}),
    ('139 GiB', 'b4', 'Qwen3-8B', {'batch_size': 8, **B}),
    ('139 GiB', 'b4, full_tune', 'Qwen3-0.6B', {'batch_size': 16, **B, 'full_tune': True}),
    ('8 x 139 GiB', 'a1', 'Qwen3-8B', {'batch_size': 32, 'ranks': 8}),
    ('8 x 139 GiB', 'a2', 'Qwen3-8B', {'batch_size': 8, **A2, 'ranks': 8}),
    ('8 x 139 GiB', 'b3', 'Qwen3-8B', {'batch_size': 16, **B, 'ranks': 8}),
    ('8 x 139 GiB', 'b4', 'Qwen3-8B', {'batch_size': 8, **B, 'ranks': 8}),
    ('8 x 139 GiB', 'b4, full_tune', 'Qwen3-8B', {'batch_size': 1, **B, 'full_tune': True, 'ranks': 8})]


def table():
    """PLAN in Markdown, GiB on one GPU."""
    lines = ['| GPU | stage | base | batch_size x tokens | frozen | learned | for backward | **peak** | |',
             '|---|---|---|---|---|---|---|---|---|']
    tower = known_config('google/siglip2-so400m-patch14-384', SiglipVisionConfig)
    for gpu, stage, base, how in PLAN:
        need = memory_needed(stage[:2], known_config(f'Qwen/{base}', Qwen3Config), tower, **how)
        learned = need['trained'] + need['gradients'] + need['optimizer']
        fits = need['peak'] * 1.1 + GIB <= float(gpu.split()[-2]) * GIB
        lines.append(f'| {gpu} | {stage} | {base} | {how["batch_size"]} x {how.get("row_tokens", 128)} | '
                     f'{gib(need["frozen"])} | {gib(learned)} | {gib(need["activations"] + need["logits"])} | '
                     f'**{gib(need["peak"])}** | {"fits" if fits else "**too large**"} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    # -----------------------------------------------------------------------------
    # settings; override any with a config file or --key=value
    stage = 'a1'                   # a1, a2, b3 or b4
    llm = 'Qwen/Qwen3-8B'          # a Hugging Face name or folder; its config is all that is read
    vision = 'google/siglip2-so400m-patch14-384'   # Track A
    batch_size = 8                 # rows of a micro-batch on one GPU
    row_tokens = 128               # tokens of a row, image tokens included; the longest rows come in one micro-batch
    labels = 40                    # of these, text to predict
    codes = 0                      # of these, codes to predict (Track B)
    code_range = 16_384            # ids of the range that a code is one of
    new_rows = 32_772              # new ids of the token space
    num_image_tokens = 64
    lora_r = 16
    full_tune = False              # stage B4 without LoRA
    ranks = 1                      # GPUs in all
    table_only = False
    config = configure(globals())
    # -----------------------------------------------------------------------------
    if stage not in ('a1', 'a2', 'b3', 'b4') or full_tune and stage != 'b4':
        raise SystemExit(f'stage = {stage!r}, full_tune = {full_tune}: wanted a1, a2, b3 or b4, and full_tune with b4')
    if table_only:
        print(table())
    else:
        tower = known_config(vision, SiglipVisionConfig) if stage[0] == 'a' else None
        how = {k: v for k, v in config.items() if k not in ('stage', 'llm', 'vision', 'table_only')}
        for part, size in memory_needed(stage, known_config(llm, Qwen3Config), tower, **how).items():
            print(f'{part:<12} {gib(size):>8} GiB')
