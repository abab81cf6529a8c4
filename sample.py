"""
Use a checkpoint: caption pictures with an A1 run, ask about them or chat with an A2 run; with a B3 or B4 run describe
pictures and sounds, draw, and generate audio. Or export it: a folder that other programs load, with a card.

reads   a run's out dir (its ckpt/ names the base models and codecs), pictures and sounds
writes  generated pictures and audio, in the folder --to; one line per answer, or one JSON object per line with --json;
        with --export that folder alone, whole or not at all
done    when everything has its answer; exits 1 at the first file that cannot be read

$ python sample.py out/a1_small --image data/small/captions/images/000000.png
$ python sample.py out/a2_small --image data/small/instruct/images/000000.png --prompt "How many shapes can you see?"
$ python sample.py out/a2_small --image data/small/instruct/images/000000.png      # on a terminal: a chat
$ python sample.py out/a2_small --image left.png right.png --prompt "Is <image> like <image>?"
$ python sample.py out/b4_small --draw "a red circle above a blue square" --n 4
$ python sample.py out/b4_small --sound "two high bright tones, rising, fading"
$ python sample.py out/b4_small --image data/small/captions/images/000000.png --audio data/small/sounds/audio/000000.wav
$ python sample.py out/b4_small --export out/b4_small_qwen3        # a stock Qwen3: transformers alone loads it
$ python sample.py out/a2_small --export out/a2_small_graft        # for load_exported of tools/export.py
"""
import argparse
import json
import math
import sys
from pathlib import Path

from PIL import Image

from common import frozen_dtype, init_ranks, load_checkpoint, one_line_io_errors, require_vacant
from lists import text_is_unicode
from inference import VisionChat, load_graft
from media import BadSample, read_audio, read_image, write_picture, write_sound
from decoders import tuned_parts, with_lora
from sharding import join_shards
from token_model import load_token_model, read_text, write_codes
from templates import answer_text
from tools.export import export_graft, export_token_model, usual_guidance
from uti import UTI, Grammar, TokenSpace

# -----------------------------------------------------------------------------
# arguments
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('run', help='out dir of train_a1.py, train_a2.py, train_b3.py or train_b4.py')
parser.add_argument('--image', nargs='+', default=[], metavar='FILE', help='one or more pictures')
parser.add_argument('--audio', nargs='+', default=[], metavar='FILE', help='one or more sounds to describe (B3, B4)')
parser.add_argument('--draw', nargs='+', default=[], metavar='TEXT', help='a picture of each text (B3, B4)')
parser.add_argument('--sound', nargs='+', default=[], metavar='TEXT', help='audio of each text (B3, B4)')
parser.add_argument('--n', type=int, default=1, help='of each answer, seeds --seed, --seed + 1, ...')
parser.add_argument('--guidance', type=float, help="above 1 the text counts more; default: the run's own (B3, B4)")
parser.add_argument('--to', default='out/samples', metavar='FOLDER', help='where generated pictures and audio go')
parser.add_argument('--prompt', help='what to ask about the pictures together, each where an <image> stands, else all '
                    'first (A2); without it: a chat on a terminal, else a description of each')
parser.add_argument('--export', metavar='FOLDER', help='write the run as a model that others load, and nothing else')
parser.add_argument('--json', action='store_true', help='one JSON object per line')
parser.add_argument('--max_new_tokens', type=int, default=128)
parser.add_argument('--temperature', type=float, help="0 is greedy; default: greedy for text, the run's own setting "
                    'for pictures and audio')
parser.add_argument('--top_p', type=float, default=1.0)
parser.add_argument('--seed', type=int, default=0)
parser.add_argument('--device', default='auto')
parser.add_argument('--llm', help='where the language model is now, if not where the checkpoint says')
parser.add_argument('--vision', help='the same for the vision tower')
parser.add_argument('--image_codec', help='the same for the codec of pictures')
parser.add_argument('--audio_codec', help='the same for the codec of sounds')
args = parser.parse_args()

# checks
asked = args.image or args.audio or args.draw or args.sound
if args.export and asked:
    parser.error('--export goes alone: wanted no --image, --audio, --draw or --sound beside it')
if not args.export and not asked:
    parser.error('nothing to do: wanted --image, --audio, --draw, --sound or --export')
if args.max_new_tokens < 1 or args.n < 1:
    parser.error('wanted --max_new_tokens and --n of at least 1')
if args.temperature is not None and not args.temperature >= 0:
    parser.error('wanted a --temperature of at least 0')
if args.guidance is not None and not math.isfinite(args.guidance):
    parser.error('wanted a --guidance that is a number')
if not 0 < args.top_p <= 1:
    parser.error('wanted a --top_p above 0 and up to 1')
for text in [args.prompt or '', *args.draw, *args.sound]:
    if not text_is_unicode(text):                      # a terminal in Latin-1
        raise SystemExit(f'{text!r} is not UTF-8: wanted a text in UTF-8')
if args.export:
    require_vacant(args.export)

# the run, as its checkpoint describes it
# an export takes place on the CPU, whatever the run was trained on: it multiplies next to nothing
_, _, device = init_ranks('cpu' if args.export else args.device)
tensors, meta, used = load_checkpoint(Path(args.run) / 'ckpt', device)
tensors = join_shards(tensors, used, only='tuned/')
stage = meta.get('stage')
settings = meta['settings']
if stage not in ('a1', 'a2', 'b3', 'b4'):
    raise SystemExit(f'{args.run} is a run of stage {stage!r}, wanted a1, a2, b3 or b4')
track_b = stage in ('b3', 'b4')
if track_b and args.prompt is not None:
    raise SystemExit(f'{args.run} is a {stage.upper()} run, which describes and takes no --prompt; use an A2 run to '
                     'ask, or --draw or --sound')
if not track_b and (args.audio or args.draw or args.sound):
    raise SystemExit(f'{args.run} is an {stage.upper()} run, which sees pictures only; use a B3 or B4 run for sounds '
                     'and to draw')
for name in ('vision',) if track_b else ('guidance', 'image_codec', 'audio_codec'):
    if getattr(args, name) is not None:
        raise SystemExit(f'{args.run} is a run of stage {stage}, which has no use for --{name}: leave it out')
if stage == 'a1' and args.prompt is not None:
    raise SystemExit(f'{args.run} is an A1 run, which captions and takes no --prompt; use an A2 run to ask')
if args.draw or args.sound:
    with one_line_io_errors(args.to):
        Path(args.to).mkdir(parents=True, exist_ok=True)

# the checkpoint says where the base models were; they may have moved
if args.llm:
    meta['model']['llm'] = args.llm
if args.vision and not track_b:
    meta['model']['vision'] = args.vision
if track_b:
    space = TokenSpace.of_fields(meta['token_space'])
    grammar = Grammar(space)

# in use, frozen weights have the precision of the run; an export keeps that in which its base is stored
dtype = 'auto' if args.export else frozen_dtype(settings['dtype'], device)
text_temperature = 0.0 if args.temperature is None else args.temperature   # 0 is a temperature too: it is greedy
seeds = list(range(args.seed, args.seed + args.n))


def say(line):
    """Print a line. What the terminal cannot show, as bytes in a file's name that are no text, is escaped."""
    encoding = sys.stdout.encoding or 'utf-8'
    print(line.encode(encoding, 'backslashreplace').decode(encoding))


def show(kind, file, text, **more):
    """Print one answer. file: or a list of them."""
    name = ' '.join(file) if isinstance(file, list) else file
    say(json.dumps({kind: file, **more, 'text': text}) if args.json else f'{name}: {text}')


# -----------------------------------------------------------------------------
# Track B


def load_codecs():
    """What turns files into ids and back, by the codecs that this run was trained with."""
    wanted = {}                                        # arguments of UTI.of_space
    for kind in 'image', 'audio':
        if getattr(space, kind) is None:               # a token space may have one of them alone
            continue
        name = f'{kind}_codec'
        wanted[name] = getattr(args, name) or settings[name]
        wanted[f'{kind}_prefix'] = settings.get(f'{kind}_prefix', '')
        if not wanted[name]:
            raise SystemExit(f'{args.run} was trained without its codecs: say with --{name} where this one is')
    return UTI.of_space(space, args.run, meta['model']['llm'], **wanted)   # refuses other codecs than the run's


def load_track_b():
    """(token model, the peft model around its LLM or None), ready to use."""
    model = load_token_model(**meta['model'], space=space, dtype=dtype, device=device)
    model.load_new_rows_state(tensors['new_rows'], args.run)
    adapter = None
    if stage == 'b4' and not settings['full_tune']:
        adapter = with_lora(model.llm, settings, tensors['tuned'])
    elif stage == 'b4':
        # as in training: the layers are in float32, and not frozen, which is what an export goes by
        for part in tuned_parts(model.llm).values():
            part.float().requires_grad_(True)
        # not strict: embeddings, head and new rows are not among the tuned weights; every layer has to be
        missing = model.load_state_dict(tensors['tuned'], strict=False).missing_keys
        tuned = tuple(f'llm.{name}.' for name in tuned_parts(model.llm))
        assert not any(name.startswith(tuned) for name in missing), missing
    return model.eval(), adapter


def describe(kind, file):
    """Print what the model says about a picture or a sound, once per seed."""
    grammar.length(kind)                               # exits with one line when this token space has none of it
    if kind == 'image':
        codes, _ = codecs.encode_image([read_image(file, space.image['size'])])
    else:
        codes, _ = codecs.encode_audio([read_audio(file, space.audio['sample_rate'], space.audio['samples'])])
    task = 'i2t' if kind == 'image' else 'a2t'
    payloads = [codes[0]] * args.n                     # one for each seed; greedy, their texts are alike
    answers = read_text(model, grammar, task, payloads, args.max_new_tokens,
                        temperature=text_temperature, top_p=args.top_p, seeds=seeds)
    for seed, ids in zip(seeds, answers):
        show(kind, file, answer_text(codecs.tokenizer, ids), seed=seed)


def generate(kind, k, text):
    """Draw text number k, or generate its audio, once per seed: files in the folder --to."""
    # a prompt is cut as in training: codes, two markers and the end have their place
    room = settings['max_seq_len'] - grammar.length(kind) - 3
    ids = codecs.encode_text(text)[:room]
    guidance = usual_guidance(meta) if args.guidance is None else args.guidance
    temperature = settings['temperature'] if args.temperature is None else args.temperature
    task = 't2i' if kind == 'image' else 't2a'
    payloads = write_codes(model, grammar, task, [ids] * args.n, seeds=seeds,
                           temperature=temperature, top_p=args.top_p, guidance=guidance)
    for seed, codes in zip(seeds, payloads):           # codes (N,)
        if kind == 'image':
            file = Path(args.to) / f'draw_{k}_{seed}.png'
            pixels = codecs.decode_image(codes[None], [{'size': space.image['size']}])[0]
            write_picture(file, Image.fromarray(pixels.transpose(1, 2, 0)))
        else:
            file = Path(args.to) / f'sound_{k}_{seed}.wav'
            rate = space.audio['sample_rate']
            wave = codecs.decode_audio(codes[None], [{'n_samples': space.audio['samples'], 'sample_rate': rate}])[0]
            write_sound(file, wave, rate)
        show(kind, str(file), text, seed=seed)


# -----------------------------------------------------------------------------
# Track A


def reply(image, turns, seed):
    """The model's text about image tokens. turns: [(question, answer), ..., (question, None)]; None for a caption."""
    return chat.reply(image, turns, max_new_tokens=args.max_new_tokens, temperature=text_temperature,
                      top_p=args.top_p, seed=seed)


def answer(files, prompt):
    """Print a caption, where prompt is None, or an answer about pictures, once per seed."""
    named = files if len(files) > 1 else files[0]
    tokens = chat.encode_image(*files)
    turns = None if prompt is None else [(prompt, None)]
    for seed in seeds:
        show('image', named, reply(tokens, turns, seed), prompt=prompt, seed=seed)


def chat_on_terminal(files):
    images = chat.encode_image(*files)
    turns = []
    say(f'{" ".join(files)}: ask about {"them" if len(files) > 1 else "it"}; an empty line ends the chat')
    try:
        while question := input('> ').strip():
            if not turns and '<image>' not in question:
                question = '<image>\n' * len(files) + question
            try:
                text = reply(images, [*turns, (question, None)], args.seed)
            except BadSample as e:                     # more or fewer <image> than pictures
                say(str(e))
                continue
            turns.append((question, text))
            say(text)
    except (EOFError, KeyboardInterrupt):
        print()


# -----------------------------------------------------------------------------
# what was asked for
if args.export:
    if track_b:
        model, adapter = load_track_b()
        verdict = export_token_model(model, adapter, args.export, args.run, meta)
    else:
        vlm, adapter = load_graft(tensors, meta, dtype, device)
        verdict = export_graft(vlm, adapter, args.export, args.run, meta)
    say(f'{args.export}: {verdict}; see README.md in it')
    sys.exit(0)

if track_b:
    codecs = load_codecs()                             # before the model: a missing one is met at once
    model, _ = load_track_b()
    for file in args.image:
        describe('image', file)
    for file in args.audio:
        describe('audio', file)
    for k, text in enumerate(args.draw):
        generate('image', k, text)
    for k, text in enumerate(args.sound):
        generate('audio', k, text)
    sys.exit(0)

vlm, _ = load_graft(tensors, meta, dtype, device)
chat = VisionChat(vlm, meta['model']['llm'], meta['model']['vision'], settings['max_seq_len'],
                  settings.get('think_block', False), settings.get('max_images', 1))
if stage == 'a1':
    for file in args.image:
        answer([file], None)
elif args.prompt is not None:
    answer(args.image, args.prompt)
elif sys.stdin.isatty() and not args.json:
    if args.n > 1:
        raise SystemExit('--n is of answers to a --prompt, not of a chat: leave it out')
    chat_on_terminal(args.image)
else:
    for file in args.image:
        answer([file], 'Describe this image.')
