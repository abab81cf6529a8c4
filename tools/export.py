"""
Export a run: a folder that other programs load, with a card that says what it is and what its gates found.

Track A  connector.safetensors, the LoRA adapter in PEFT's format, and config.json, which load_exported() reads
Track B  a stock language model with the new rows and LoRA merged into it, and a tokenizer that spells every id

`python sample.py RUN --export FOLDER` writes one. The cards are the templates card_*.md beside this file.
"""
import json
import re
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from peft import PeftModel
from safetensors.torch import load_file, save_file

from common import frozen_dtype, sha256_file, sha256_tensors, whole_folder, write_atomic
from gates import read_verdict
from inference import VisionChat
from templates import ChatTemplate
from decoders import load_tokenizer
from model import load_vlm
from token_model import export_stock
from uti import base_name, tokenizer_sha256

# the weights of a run of Track A, beside config.json and README.md
FILES = {
    'a1': ['connector.safetensors'],
    'a2': ['connector.safetensors', 'adapter_model.safetensors', 'adapter_config.json']}

# -----------------------------------------------------------------------------
# the card


def escaped(value):
    """A value on one line, its letters shown by Markdown as they are: no link, no HTML, no end of a table's cell."""
    if isinstance(value, Markup):                      # marked `| safe` in a card: our own text, inside backticks
        return value
    line = ' '.join(str(value).split())
    line = line.encode('utf-8', 'replace').decode()    # a file's name may hold bytes that are no text
    # an underscore inside a word is one to Markdown too
    return re.sub(r'[\\`|<&*~$]|(?<=])[(\[:]|(?<![^\W_])_|_(?![^\W_])', r'\\\g<0>', line)


# finalize: every value that a card names is escaped, so that no template can forget it
CARDS = Environment(loader=FileSystemLoader(Path(__file__).parent), finalize=escaped, undefined=StrictUndefined,
                    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)


def write_card(card, folder, run, meta, **values):
    """Write folder/README.md with the verdict of the run's gates; returns that verdict in a few words.

    meta: of the run's checkpoint. The base model is named for the hub when it is a name there, not a local folder.
    """
    llm = meta['model']['llm']
    path = Path(run) / 'gates.json'
    verdicts = read_verdict(path)[0] if path.exists() else []
    failed = [gate.name for gate in verdicts if not gate.passed]
    if not verdicts:
        verdict = 'NOT JUDGED'
    elif failed:
        verdict = f'FAILED {len(failed)} of {len(verdicts)} gates'
    else:
        verdict = f'{len(verdicts)} gates passed'
    # a local folder means nothing to others, and what is no name there might be anything
    on_hub = re.fullmatch(r'[\w.-]+/[\w.-]+', llm) and not Path(llm).exists()
    text = CARDS.get_template(card).render(
        gates=verdicts, failed=failed, verdict=verdict, meta=meta, hub_name=llm if on_hub else '',
        **values)
    write_atomic(Path(folder) / 'README.md', text)
    return verdict


# -----------------------------------------------------------------------------
# what is exported is what was trained


def require_frozen(named, sha256, where):
    """The dtype, 'bfloat16' or 'float32', in which frozen weights that were loaded in their stored precision have this
    sha256: the one they had in training. Exits when in neither."""
    named = list(named)
    for name in 'bfloat16', 'float32':
        if sha256_tensors(named, getattr(torch, name)) == sha256:
            return name
    raise SystemExit(f'{where} was trained on other frozen weights than those of its base models today: restore them, '
                     'or say where they are')


def frozen_parameters(model):
    """(name, parameter) of everything that does not learn, by the names that it has without LoRA."""
    for name, p in model.named_parameters():
        if not p.requires_grad:
            yield name.replace('base_layer.', ''), p


# -----------------------------------------------------------------------------
# Track A


def export_graft(vlm, adapter, folder, run, meta):
    """Write a Track A run, base models in their stored precision; returns the verdict of its gates in a few words.

    adapter: the peft model around vlm.llm, or None. meta: of the run's checkpoint.
    """
    model = meta['model']
    n_image_tokens = model['shape']['num_image_tokens']
    think_block = meta['settings'].get('think_block', False)
    chat_template = ChatTemplate(load_tokenizer(model['llm']), n_image_tokens, meta['settings']['max_seq_len'],
                                 think_block)
    template = chat_template.shown(meta['stage'])
    trained_in = require_frozen(frozen_parameters(vlm), meta['frozen_sha256'], run)
    with whole_folder(folder) as beside:               # becomes `folder` at the end of the block, or is gone
        if adapter is not None:
            # PEFT would look at the base model's folder to decide about embeddings; LoRA here never has them
            adapter.save_pretrained(beside, save_embedding_layers=False)
            (beside / 'README.md').unlink(missing_ok=True)   # PEFT's own card, which is empty
        connector = {name: tensor.contiguous() for name, tensor in vlm.connector.state_dict().items()}
        save_file(connector, beside / 'connector.safetensors')
        # of the weights, so that load_exported() refuses damaged ones
        files = {path.name: sha256_file(path) for path in sorted(beside.iterdir())}
        config = {
            'stage': meta['stage'], 'step': meta['step'], 'model': model, 'template': template,
            'max_seq_len': meta['settings']['max_seq_len'], 'max_images': meta['settings'].get('max_images', 1),
            'think_block': think_block, 'dtype': meta['settings']['dtype'],
            'frozen_sha256': meta['frozen_sha256'], 'frozen_dtype': trained_in, 'files': files}
        (beside / 'config.json').write_text(json.dumps(config, indent=1) + '\n')
        n_connector = sum(tensor.numel() for tensor in vlm.connector.parameters())
        return write_card(
            'card_graft.md', beside, run, meta, library='nanograft', name=Path(folder).name,
            llm=base_name(model['llm']), vision=base_name(model['vision']), template=template,
            image_markers=chat_template.image_markers, num_image_tokens=n_image_tokens, connector=f'{n_connector:,}',
            frozen_dtype=trained_in, max_images=config['max_images'])


def load_exported(folder, llm='', vision='', device='cpu', dtype='auto'):
    """The VisionChat of a folder that export_graft() wrote.

    llm, vision: where the two base models are, if not where its config.json says. dtype: of the frozen weights,
    'bfloat16' or 'float32'; 'auto' is what the run's settings say. Exits with one line when a file is damaged or a base
    model is not the one that was trained with.
    """
    folder = Path(folder)
    config = read_config(folder)
    model = config['model']
    model['llm'] = llm or model['llm']
    model['vision'] = vision or model['vision']
    dtype = frozen_dtype(config['dtype'] if dtype == 'auto' else dtype, torch.device(device))
    vlm = load_vlm(**model, dtype='auto')              # as stored: the sha256 is of these bits
    require_frozen(frozen_parameters(vlm), config['frozen_sha256'], folder)
    for _, p in frozen_parameters(vlm):
        p.data = p.data.to(dtype)                      # not vlm.to(dtype): rotary frequencies stay in float32
    vlm.connector.load_state_dict(load_file(folder / 'connector.safetensors'))
    if config['stage'] == 'a2':
        PeftModel.from_pretrained(vlm.llm, folder)     # puts LoRA into the language model in its place
    return VisionChat(vlm.to(device), model['llm'], model['vision'], config['max_seq_len'],
                      config.get('think_block', False), config.get('max_images', 1))


def read_config(folder):
    """The config.json of an exported Track A run; exits unless every file is the one that it describes."""
    try:
        config = json.loads((folder / 'config.json').read_text())
        files = dict(config['files'])
        wanted = FILES[config['stage']]
        config['model']['llm']
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise SystemExit(f'{folder}: no exported run of Track A here ({e}); sample.py writes one with --export')
    for name in wanted:                                # all of them, whatever config.json says: {} would vouch for any
        if not (folder / name).is_file() or sha256_file(folder / name) != files.get(name):
            raise SystemExit(f'{folder}/{name} is not the file that config.json describes: export the run again')
    return config


# -----------------------------------------------------------------------------
# Track B


def export_token_model(model, adapter, folder, run, meta):
    """Write a Track B run as a stock model of Hugging Face, everything merged; returns the verdict of its gates.

    model: a TokenModel on a base in its stored precision, which is used up: LoRA is merged into it, and tuned layers
    get the precision of the base. adapter: the peft model around model.llm, or None. meta: of the run's checkpoint.
    """
    space = model.space
    llm = meta['model']['llm']
    # before the weights change: is everything here that the run was trained with?
    tokenizer = load_tokenizer(llm)
    if tokenizer_sha256(tokenizer) != space.base['tokenizer_sha256']:
        raise SystemExit(f'{llm} has another tokenizer than {run} was made with: restore it')
    require_frozen(frozen_parameters(model), meta['frozen_sha256'], run)
    if adapter is not None:
        adapter.merge_and_unload()                     # in place; W + scale B A rounds once, to the precision of W
    # after merging: tuned layers are masters in float32, and the base may be stored in bfloat16
    model.llm.to(model.llm.get_input_embeddings().weight.dtype)
    modalities = [name for name, there in (('pictures', space.image), ('sounds', space.audio)) if there]
    with whole_folder(folder) as beside:
        export_stock(model, tokenizer, beside)
        return write_card(
            'card_token_model.md', beside, run, meta, library='transformers', name=Path(folder).name, space=space,
            modalities=modalities, end_of_text=tokenizer.convert_ids_to_tokens(space.text_end),
            lora=adapter is not None, typed_head=model.typed_head,
            guidance=usual_guidance(meta))


def usual_guidance(meta):
    """The guidance that a Track B run generates with; a B4 run tries several and is judged by the first."""
    guidance = meta['settings']['guidance']
    return guidance if meta['stage'] == 'b3' else guidance[0]
