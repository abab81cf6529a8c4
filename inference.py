"""
A model in use: what the right image is worth to it, what it generates, its predictions for the log, a chat.

Letters: B examples, T tokens of one, N image tokens, M labels, D width of the language model, C conditions of the
ablation.
"""
import json

import numpy as np
import torch

from common import (
    all_gather, all_sum, barrier, gather_in_order, in_parts, rank_parts, sha256_file, stoppable_parts, write_atomic)
from templates import ChatTemplate, answer_text
from data import answer_starts, collate, length_buckets
from decoders import generate, load_tokenizer, with_lora
from grounding import Prediction, retrieval, share_removed
from lists import Item, place_images
from model import image_reading, image_settings, load_vlm

# -----------------------------------------------------------------------------
# the image ablation: what is the right image worth?

CONDITIONS = ('correct', 'shuffled', 'zero', 'noise')


def sum_by_example(values, batch):
    """(M, C), C numbers for each label -> (B, C): their sums over the labels of each example."""
    sums = values.new_zeros(len(batch.ids), values.shape[1])
    return sums.index_add(0, batch.label_examples, values)


def token_moments(image_tokens, width, device):
    """Mean and deviation in each dimension, (D,) each, over this and all other ranks' image tokens, [(B, N, D)]."""
    n = 0
    total = torch.zeros(width, dtype=torch.float64)
    total_square = torch.zeros(width, dtype=torch.float64)
    for tokens in image_tokens:
        tokens = tokens.double()
        n += tokens.shape[0] * tokens.shape[1]
        total += tokens.sum((0, 1)).cpu()
        total_square += tokens.square().sum((0, 1)).cpu()
    n = all_sum(n)
    mean = sum(all_gather(total)) / n
    variance = sum(all_gather(total_square)) / n - mean ** 2
    std = variance.clamp(min=0).sqrt()                 # rounding can leave it just below zero
    return mean.to(device), std.to(device)


def images_before(counts, place):
    """As many images as the example at this place has, of the examples before it: [(place, number of its image)].

    counts: of the images of each example. Places go on below 0, from the end; where all others have too few, some are
    taken again.
    """
    found = []
    other = place
    while len(found) < counts[place] and other > place - len(counts) + 1:
        other -= 1
        found = [(other, k) for k in range(counts[other])] + found
    # the nearest ones; repeated, since all others together may have fewer (and none where this one has none)
    return (counts[place] * found)[-counts[place]:]


@torch.no_grad()
def image_ablation(vlm, loader, examples, batch_size, seed, rank=0, world_size=1):
    """The loss of each example under four kinds of images: {condition: (examples,) float64}, in nats, on every rank.

    correct   its own
    shuffled  other examples': a derangement over the whole set, so that nobody keeps its own
    zero      image tokens that are all zero
    noise     Gaussian image tokens, with the mean and deviation that real ones have in each dimension
    """
    vlm.eval()
    device = vlm.llm.device
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()   # each gets images of those before it
    counts = [len(examples[i].image_starts) for i in order]
    blocks = np.array_split(np.arange(len(examples)), world_size)
    places = blocks[rank].tolist()
    others = {place: images_before(counts, place) for place in places}
    first = min((place for found in others.values() for place, _ in found), default=0)
    needed = range(first, places[-1] + 1) if places else []   # places, counted from the end below 0
    tokens = {}                                        # {place: (images, N, D)}: each goes through the tower once
    # most: no rank needs more places than its block and, of the images before it, as many as the most of an example
    for part in stoppable_parts(needed, batch_size, most=len(blocks[0]) + max(counts)):
        found = vlm.image_tokens(loader.images([examples[order[place]] for place in part]).to(device))
        tokens.update(zip(part, found.split([counts[place] for place in part])))
    # noise needs the moments of all real tokens, over every rank
    mean, std = token_moments([tokens[place] for place in places], vlm.llm.config.hidden_size, device)

    losses = {}                                        # {index of an example: its loss under each condition}
    for part in stoppable_parts(places, batch_size, most=len(blocks[0])):
        part = sorted(part, key=lambda place: len(examples[order[place]]), reverse=True)
        correct = torch.cat([tokens[place] for place in part])                                  # (images, N, D)
        # seeded by the example: the same noise for any batch size and number of ranks
        draws = []
        for place in part:
            generator = torch.Generator().manual_seed(order[place])
            draws.append(torch.randn(tokens[place].shape, generator=generator))
        shuffled = [tokens[other][k] for place in part for other, k in others[place]]
        images = {'correct': correct,
                  'shuffled': torch.stack(shuffled),
                  'zero': torch.zeros_like(correct),
                  'noise': (mean + std * torch.cat(draws).to(device)).to(correct.dtype)}
        batch = collate([examples[order[place]] for place in part], None, correct.shape[1]).to(device)
        by_label = [vlm.nll(batch, images[condition]).double() for condition in CONDITIONS]     # four times (M,)
        sums = sum_by_example(torch.stack(by_label, dim=1), batch).tolist()
        losses.update({order[place]: row for place, row in zip(part, sums)})
    vlm.train()
    every = {}
    for of_a_rank in all_gather(losses):
        every.update(of_a_rank)
    table = np.array([every[i] for i in range(len(examples))]).reshape(-1, len(CONDITIONS))     # (examples, 4)
    return dict(zip(CONDITIONS, table.T))


@torch.no_grad()
def crossed_losses(vlm, loader, examples, sets, batch_size, rank=0, world_size=1):
    """The loss of every example of a set under every image of the set: (sets, n, n) float64, in nats, on every rank.

    [s, i, j] is that of example j under the images of example i. sets: of matching_sets, all of n indices of examples
    with as many images.
    """
    vlm.eval()
    device = vlm.llm.device
    tables = []
    for members in sets:
        chosen = [examples[i] for i in members]
        n = len(chosen)
        images = [loader.images(part).to(device) for part in in_parts(chosen, batch_size)]
        tokens = torch.cat([vlm.image_tokens(part) for part in images])                         # (n * images, N, D)
        tokens = tokens.unflatten(0, (n, -1))                                                   # (n, images, N, D)
        losses = []
        for part in rank_parts(range(n * n), batch_size, rank, world_size):
            texts = [chosen[k // n] for k in part]     # text by text: those of a batch are equally long
            batch = collate(texts, None, tokens.shape[2]).to(device)
            by_label = vlm.nll(batch, tokens[[k % n for k in part]].flatten(0, 1)).double()     # (M,)
            losses.extend(sum_by_example(by_label[:, None], batch)[:, 0].tolist())
        tables.append(np.array(gather_in_order(losses)).reshape(n, n).T)
    vlm.train()
    return np.stack(tables)


def caption_keys(examples):
    """(input, output) of each example, for matching_sets."""
    return [(example.item.images, example.ids[example.label_positions].tobytes()) for example in examples]


def ablation_means(losses, counts, bucket_edges, crossed):
    """What the log keeps of an evaluation. losses: of image_ablation; counts: (examples,), labels of each; crossed: of
    crossed_losses.

    share_removed: of the loss under another image, the share that the right one removes; what grounding.retrieval
    measures. The mean loss per label in nats under each condition and, with the right image, in each length bucket;
    win_<condition>: the share of examples on which the right image has a lower loss than that one.
    """
    correct = losses['correct']
    means = {'share_removed': share_removed(correct, losses['shuffled']).value, **retrieval(crossed)}
    for condition, loss in losses.items():
        means[condition] = float(loss.sum() / counts.sum())
    for bucket, members in length_buckets(counts, bucket_edges).items():
        means[bucket] = float(correct[members].sum() / counts[members].sum())
    for condition in CONDITIONS[1:]:
        means[f'win_{condition}'] = float((losses[condition] > correct).mean())
    return means


# -----------------------------------------------------------------------------
# predictions


@torch.no_grad()
def complete_examples(vlm, loader, prompts, batch_size, max_new_tokens, stop_ids, rank=0, world_size=1):
    """Greedy continuations, a list of ids for each prompt, on every rank.

    prompts: [(example, length of its prompt in ids)]; the images that stand in the prompt go in.
    """
    vlm.eval()
    outputs = []
    for part in rank_parts(prompts, batch_size, rank, world_size):
        # all pictures of the part at once; an example's, for the prompts of all its answers, once
        pictured = {example.item.images: example for example, _ in part if len(example.image_starts)}
        tokens_of = {}                                 # {paths: (images, N, D)}
        if pictured:
            tokens = vlm.image_tokens(loader.images(pictured.values()).to(vlm.llm.device))
            tokens_of = dict(zip(pictured, tokens.split([len(paths) for paths in pictured])))
        embeds = []
        for example, length in part:
            starts = example.image_starts[example.image_starts < length]
            image_tokens = tokens_of[example.item.images][:len(starts)] if len(starts) else None
            embeds.append(vlm.embed_prompt(example.ids[:length], starts, image_tokens))
        with vlm.precision():
            outputs.extend(generate(vlm.llm, embeds, max_new_tokens, stop_ids=stop_ids))
    vlm.train()
    return gather_in_order(outputs)


def write_predictions(path, vlm, loader, template, examples, batch_size, max_new_tokens, rank=0, world_size=1):
    """Complete every answer of some examples, greedily, after the true answers before it; a caption is one answer to no
    question. Rank 0 writes one JSON line for each to `path`.

    Returns on every rank ([Prediction], a line for each example: its first prediction, behind its question).
    """
    prompts = []
    turns = []
    for example in examples:
        for turn, start in enumerate(answer_starts(example)):
            prompts.append((example, start))
            turns.append(turn)
    outputs = complete_examples(vlm, loader, prompts, batch_size=batch_size, max_new_tokens=max_new_tokens,
                                stop_ids=[template.end], rank=rank, world_size=world_size)
    texts = [answer_text(template.tokenizer, output) for output in outputs]
    lines = []
    predictions = []
    first_replies = []
    for (example, _), turn, output, text in zip(prompts, turns, outputs, texts):
        item = example.item
        question, truth = item.turns[turn]
        is_chat = question or len(item.turns) > 1      # a caption is one answer that nobody asked for
        asked = {'turn': turn, 'question': question} if is_chat else {}
        predictions.append(Prediction(truth, text, is_cut=len(output) >= max_new_tokens,
                                      truth_is_cut=len(template.encode(truth)) >= max_new_tokens, question=question))
        if turn == 0:
            first_replies.append(f'{question} - {text}' if question else text)
        if rank == 0:                                  # only who writes needs the hash of the file
            named = {'image': item.images, 'image_sha256': [sha256_file(path) for path in item.images]}
            if len(item.images) == 1:                  # as lists have it: one path, or a list of several
                named = {key: value[0] for key, value in named.items()}
            lines.append(json.dumps({'id': item.id, **named, **asked, 'truth': truth, 'prediction': text}) + '\n')
    if rank == 0:
        write_atomic(path, ''.join(lines))
    barrier()
    return predictions, first_replies


# -----------------------------------------------------------------------------
# the model in use


def load_graft(tensors, meta, dtype, device='cpu'):
    """(VLM, PEFT's wrapper of its LLM or None) of an A1 or A2 run. tensors, meta: of load_checkpoint."""
    vlm = load_vlm(**meta['model'], dtype=dtype, device=device)
    vlm.connector.load_state_dict(tensors['connector'])
    if meta['stage'] == 'a1':
        return vlm, None
    return vlm, with_lora(vlm.llm, meta['settings'], tensors['lora'])


class VisionChat:
    """A trained VLM that takes image files and gives words: `chat.reply(chat.encode_image('picture.png'))`."""
    def __init__(self, vlm, llm, vision, max_seq_len, think_block=False, max_images=1):
        self.vlm = vlm.eval()
        self.tokenizer = load_tokenizer(llm)
        self.template = ChatTemplate(self.tokenizer, len(vlm.connector.latents), max_seq_len, think_block)
        self.max_images = max_images
        self.read = image_reading(image_settings(vision))

    @torch.no_grad()
    def encode_image(self, *files):
        """Image files -> image tokens (images, N, D)."""
        pixels = torch.from_numpy(np.stack([self.read(file) for file in files]))                # (images, 3, H, W)
        return self.vlm.image_tokens(pixels.to(self.vlm.llm.device))

    @torch.no_grad()
    def reply(self, image_tokens, turns=None, max_new_tokens=128, temperature=0.0, top_p=1.0, seed=0):
        """What the model has to say about the image tokens.

        turns: [(question, answer), ..., (question, None)], for a model of stage A2; None: a caption, of stage A1.
        Images stand where the questions have their <image>, all of them first where none has one. Exits with one line
        when marks and images differ in number, or when all of it does not fit into max_seq_len.
        """
        n_images = len(image_tokens)
        if n_images > self.max_images:
            raise SystemExit(f'{n_images} images in one text: this run was trained with up to {self.max_images}')
        if turns:
            places = ()
            if any('<image>' in question for question, _ in turns):
                turns, places = place_images(turns, n_images, 'the questions')
            example = self.template.chat(Item('chat', n_images * ('image',), tuple(turns), image_places=places))
            ids = example.ids
        else:
            example = self.template.caption(Item('caption', ('image',), (('', ''),)))
            ids = example.ids[:example.label_positions[0]]   # without the empty caption's end token
        if example.truncated:
            raise SystemExit(f'the chat is longer than max_seq_len = {self.template.max_seq_len}: start a new one')
        prompt = self.vlm.embed_prompt(ids, example.image_starts, image_tokens)                 # (T, D)
        with self.vlm.precision():
            output = generate(self.vlm.llm, [prompt], max_new_tokens, stop_ids=[self.template.end],
                              temperature=temperature, top_p=top_p, seeds=[seed])[0]
        return answer_text(self.tokenizer, output)
