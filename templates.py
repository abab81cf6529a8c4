"""
How a sample becomes ids: the turn formats of language models, the markers that a tokenizer has, and a sample put
together of them, its labels known while it is assembled.
"""
import copy
import hashlib
import inspect
import re
from dataclasses import dataclass, replace

import numpy as np

import lists
from common import canonical, first_line
from examples import NO_IMAGES, Example
from lists import Item, shown

# -----------------------------------------------------------------------------
# turn formats


@dataclass(frozen=True)
class TurnFormat:
    """The texts around a question and an answer."""
    name: str
    user: tuple                        # before a question; after it, up to where the answer begins
    end: str                           # the marker that ends an answer; it is learned, since it is what stops a reply
    between: str = ''                  # after that, between turns
    system: tuple = ()                 # before and after a system text; () puts it before the first question

    def texts(self):
        return [*self.user, *self.system, self.between, '\n\n']

    def markers(self):
        return re.findall(MARKER, ''.join([*self.user, *self.system, self.end]))


MARKER = r'<\|\w+\|>|<\w+_of_turn>|\[/?[A-Z_]+\]|</s>'
FORMATS = (
    TurnFormat('ChatML', ('<|im_start|>user\n', '<|im_end|>\n<|im_start|>assistant\n'), '<|im_end|>', '\n',
               ('<|im_start|>system\n', '<|im_end|>\n')),
    TurnFormat('Llama 3', ('<|start_header_id|>user<|end_header_id|>\n\n',
                           '<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n'), '<|eot_id|>', '',
               ('<|start_header_id|>system<|end_header_id|>\n\n', '<|eot_id|>')),
    TurnFormat('Gemma', ('<start_of_turn>user\n', '<end_of_turn>\n<start_of_turn>model\n'), '<end_of_turn>', '\n'),
    TurnFormat('Mistral v7', ('[INST]', '[/INST]'), '</s>', '', ('[SYSTEM_PROMPT]', '[/SYSTEM_PROMPT]')),
    TurnFormat('Mistral', ('[INST]', '[/INST]'), '</s>'),
    TurnFormat('Phi-3', ('<|user|>\n', '<|end|>\n<|assistant|>\n'), '<|end|>', '\n', ('<|system|>\n', '<|end|>\n')),
    TurnFormat('Granite', ('<|start_of_role|>user<|end_of_role|>',
                           '<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>'), '<|end_of_text|>', '\n',
               ('<|start_of_role|>system<|end_of_role|>', '<|end_of_text|>\n')),
    TurnFormat('Cohere', ('<|START_OF_TURN_TOKEN|><|USER_TOKEN|>',
                          '<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>'), '<|END_OF_TURN_TOKEN|>', '',
               ('<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>', '<|END_OF_TURN_TOKEN|>')))


def marker_id(tokenizer, marker):
    """The id of a marker, None where the tokenizer has none."""
    id = tokenizer.convert_tokens_to_ids(marker)
    return None if id == tokenizer.unk_token_id and marker != tokenizer.unk_token else id


def turn_format(tokenizer):
    """Of the FORMATS whose markers the tokenizer has, the one that its own chat template writes, else the first; plain
    words and its end of text where it has none of them."""
    there = [form for form in FORMATS if all(marker_id(tokenizer, marker) is not None for marker in form.markers())]
    for form in there:
        if not chat_difference(tokenizer, form):
            return form
    if there:
        return there[0]
    if tokenizer.eos_token is None:
        names = ', '.join(form.name for form in FORMATS)
        raise SystemExit('the tokenizer has no markers of turns and no end of text: nothing would stop an answer; '
                         f'wanted one with the markers of {names}, or an eos_token')
    return TurnFormat('plain words', ('User: ', '\nAssistant: '), tokenizer.eos_token, '\n', ('', '\n'))


def begin_ids(tokenizer):
    """The ids that the tokenizer puts before every text by itself: Llama's, Mistral's and Gemma's expect one."""
    ids = tokenizer.encode('a')
    alone = tokenizer.encode('a', add_special_tokens=False)
    for n in range(len(ids)):
        if ids[n:n + len(alone)] == alone:
            return ids[:n]
    return []


def chat_difference(tokenizer, form, think_block=''):
    """One line when the tokenizer's own chat template writes two turns otherwise than this format does, with this
    before the last answer, else ''."""
    if not tokenizer.chat_template:
        return ''
    turns = [('user', 'Why?'), ('assistant', 'So.'), ('user', 'And?'), ('assistant', 'No.')]
    before, after = form.user
    ours = [*begin_ids(tokenizer)]
    first = [before, 'Why?', after, 'So.', form.end, form.between]
    for text in *first, before, 'And?', after, think_block, 'No.', form.end:
        ours += tokenizer.encode(text, add_special_tokens=False)
    try:
        turns = [{'role': role, 'content': words} for role, words in turns]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as e:                             # a template is a program: its errors are of any kind
        return f'its own chat template cannot write a chat of two turns: {first_line(e)}'
    theirs = tokenizer.encode(text, add_special_tokens=False)
    if theirs[:len(ours)] == ours and not tokenizer.decode(theirs[len(ours):]).strip():
        return ''
    same = 0
    while ours[:same + 1] == theirs[:same + 1]:
        same += 1
    return (f'its own chat template is not {form.name}: it goes on with {tokenizer.decode(theirs[same:same + 12])!r} '
            f'where this run writes {tokenizer.decode(ours[same:same + 12])!r}')


# -----------------------------------------------------------------------------
# markers of an image

IMAGES = (                                             # start, end, pad
    ('<|vision_start|>', '<|vision_end|>', '<|image_pad|>'),
    ('<start_of_image>', '<end_of_image>', '<image_soft_token>'))
UNUSED = re.compile(r'reserved|unused|placeholder|\[control_|<SPECIAL_|extra_id|dummy', re.IGNORECASE)


def image_markers(tokenizer):
    """(start, end, pad): the tokenizer's own, else three that its makers left unused; None where it has neither, and
    the connector learns what stands around an image."""
    for markers in IMAGES:
        if all(marker_id(tokenizer, marker) is not None for marker in markers):
            return markers
    added = sorted(tokenizer.get_added_vocab().items(), key=lambda pair: pair[1])
    unused = [token for token, _ in added if UNUSED.search(token)]
    return tuple(unused[:3]) if len(unused) >= 3 else None


# -----------------------------------------------------------------------------
# tokens that a tokenizer has added and does not call special: Qwen3's <think>, <tool_call>, <|fim_prefix|>

THINK_BLOCK = '<think>\n\n</think>\n\n'                # an empty one: what Qwen3 writes where it is not to think
ADDED = re.compile(r'<\|.*\|>|</?(think|tool_\w+)>')   # Gemma's added tokens are also tags of HTML and line ends


def plain_tokenizer(tokenizer):
    """The tokenizer for text in which nothing is a marker: a copy in which the ADDED ones are special, since
    split_special_tokens keeps no others plain."""
    tokens = getattr(tokenizer, 'added_tokens_decoder', {}).values()
    added = [str(token) for token in tokens if not token.special and ADDED.fullmatch(str(token))]
    if not added:
        return tokenizer
    plain = copy.deepcopy(tokenizer)
    plain.add_tokens(added, special_tokens=True)
    return plain


def answer_text(tokenizer, ids):
    """The text of generated ids, without a think block: one that is not closed reaches to the end."""
    ids = list(ids)
    opening = marker_id(tokenizer, '<think>')
    closing = marker_id(tokenizer, '</think>')
    if closing is not None and closing in ids:
        ids = ids[len(ids) - ids[::-1].index(closing):]
    if opening is not None and opening in ids:
        ids = ids[:ids.index(opening)]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


# -----------------------------------------------------------------------------
# samples as ids


class ChatTemplate:
    """How a sample becomes ids. Markers are looked up once; text is encoded so that markers typed in it stay plain.

    image_length: positions that an image's embeddings are written over: its image tokens and, where the tokenizer has
    no markers for an image, one learned embedding at each end. think_block: an empty one stands before the last answer
    of a chat, as in Qwen3's own template with enable_thinking = False.
    """
    def __init__(self, tokenizer, num_image_tokens, max_seq_len, think_block=False):
        self.tokenizer = tokenizer
        self.plain = plain_tokenizer(tokenizer)
        self.num_image_tokens = num_image_tokens
        self.max_seq_len = max_seq_len
        self.known = {}                                # {(text, whether markers in it are markers): its ids}
        self.format = turn_format(tokenizer)
        self.begin = begin_ids(tokenizer)
        self.end = marker_id(tokenizer, self.format.end)
        self.image_markers = image_markers(tokenizer)
        self.learned_edges = self.image_markers is None
        self.image_length = num_image_tokens
        if self.learned_edges:                         # every id of the block is written over: any will do
            self.image_length += 2
            self.image_block = [self.end] * self.image_length
        else:
            start, end, pad = [marker_id(tokenizer, marker) for marker in self.image_markers]
            self.image_block = [start, *[pad] * num_image_tokens, end]
        # our own words, in which markers are markers
        self.pieces = {text: tokenizer.encode(text, add_special_tokens=False) for text in self.format.texts()}
        self.think_block = THINK_BLOCK if think_block else ''
        if think_block and marker_id(tokenizer, '<think>') is None:
            raise SystemExit('think_block = True, but the tokenizer has no <think>: wanted that of a Qwen3')
        self.pieces[self.think_block] = tokenizer.encode(self.think_block, add_special_tokens=False)
        if max_seq_len < len(self.image_block) + 8:
            raise SystemExit(f'max_seq_len = {max_seq_len} leaves no room for text after {num_image_tokens} image '
                             'tokens')

    @property
    def image_offset(self):
        """From the start of the image block to the first position that is written over."""
        return 0 if self.learned_edges else 1

    def sha256(self):
        """Over all that decides the ids of a sample: the tokenizer, the sizes, and the code that puts them together."""
        decides = [self.tokenizer.backend_tokenizer.to_str(), self.num_image_tokens, self.max_seq_len, self.begin,
                   self.think_block, self.format.texts(), inspect.getsource(inspect.getmodule(ChatTemplate)),
                   inspect.getsource(lists)]
        return hashlib.sha256(canonical(decides).encode()).hexdigest()

    def encode(self, text, markers=False):
        """markers: whether '<|im_end|>' in it is the marker; else a user's '<|image_pad|>' becomes ordinary characters,
        never an image."""
        if (text, markers) in self.known:
            return self.known[text, markers]
        encoder = self.tokenizer if markers else self.plain
        return encoder.encode(text, add_special_tokens=False, split_special_tokens=not markers)

    def examples(self, kind, items):
        """[Example] of Items by `kind`, 'caption' or 'chat', or of (where, text) pairs, 'text'. All their texts are
        encoded in one call, each on its own: the ids are those that it has alone."""
        is_text = kind == 'text'
        texts = {'\n'}
        for item in items:
            texts.update([item[1]] if is_text else texts_of(item))
        texts = sorted(texts)
        encoder = self.tokenizer if is_text else self.plain
        encoded = encoder(texts, add_special_tokens=False, split_special_tokens=not is_text,
                          return_attention_mask=False)['input_ids']
        self.known = {(text, is_text): ids for text, ids in zip(texts, encoded)}
        if is_text:
            made = [self.text(text, where) for where, text in items]
        else:
            made = [getattr(self, kind)(item) for item in items]
        self.known = {}
        return made

    def example(self, item, ids, label_positions, image_starts):
        """Cut to max_seq_len at the end, but never in an image block: what stands before the first one is cut then, and
        what begins with another one goes as a whole, its image with it."""
        n = self.max_seq_len
        label_positions = np.array(label_positions, np.int32)
        image_starts = np.array(image_starts, np.int32)
        if len(ids) <= n:                              # as nearly all: hundreds of thousands are made at a first start
            return Example(item, np.array(ids, np.int32), label_positions, image_starts, truncated=False)
        block_starts = image_starts - self.image_offset
        overflow = block_starts[:1] + len(self.image_block) - n        # of the first block, above 0 where it is cut
        if (overflow > 0).any() and not (label_positions < image_starts[0]).any():
            overflow = overflow.item()
            ids = ids[:block_starts[0] - overflow] + ids[block_starts[0]:]
            for positions in label_positions, image_starts, block_starts:
                positions -= overflow
        fits = block_starts + len(self.image_block) <= n
        if not fits.all():
            n = block_starts[~fits][0]
            n_images = fits.sum()
            item = replace(item, images=item.images[:n_images], image_places=item.image_places[:n_images])
        return Example(item, np.array(ids[:n], np.int32), label_positions[label_positions < n], image_starts[fits],
                       truncated=True)

    def caption(self, item):
        """image block, newline, caption, end token; labels: the caption and its end."""
        caption = item.turns[-1][1]
        ids = [*self.begin, *self.image_block, *self.encode('\n')]
        first_label = len(ids)
        ids += [*self.encode(caption), self.end]
        return self.example(item, ids, range(first_label, len(ids)),
                            image_starts=[len(self.begin) + self.image_offset])

    def chat(self, item):
        """The turns, each image block where it stands in the user's; labels: answers and ends.

        An answer that is None leaves its turn open: the prompt of a reply.
        """
        ids = [*self.begin]
        label_positions = []
        image_starts = []
        newline = self.encode('\n')
        before_question, after_question = [self.pieces[text] for text in self.format.user]
        if item.system and self.format.system:
            before, after = [self.pieces[text] for text in self.format.system]
            ids += [*before, *self.encode(item.system), *after]
        for n, (_, answer) in enumerate(item.turns):
            ids += before_question
            if n == 0 and item.system and not self.format.system:
                ids += [*self.encode(item.system), *self.pieces['\n\n']]   # as the first words of the user
            first, *rest = parts_of(item, n)
            ids += self.encode(first)
            is_at_start = not first
            for k, part in enumerate(rest):
                # a newline beside an image at an end of the question; an image inside it has what stands there
                if not is_at_start and not any(rest[k:]):
                    ids += newline
                image_starts.append(len(ids) + self.image_offset)
                ids += self.image_block
                if is_at_start:
                    ids += newline
                ids += self.encode(part)
                is_at_start = is_at_start and not part
            ids += after_question
            if n == len(item.turns) - 1:
                ids += self.pieces[self.think_block]
            if answer is None:
                break
            first_label = len(ids)
            ids += [*self.encode(answer), self.end]    # the end token is learned too: it is what stops a reply
            label_positions += range(first_label, len(ids))
            ids += self.pieces[self.format.between]    # no label
        return self.example(item, ids, label_positions, image_starts)

    def text(self, text, where):
        """Plain text as it stands, markers in it included; every id after the first, or after what the tokenizer begins
        a text with, is a label, and one line ends the run when there is none. where: its file and line, its id."""
        item = Item(where, (), (('', text),))
        ids = [*self.begin, *self.encode(text, markers=True)]
        if len(ids) < 2:
            raise SystemExit(f'{where}: text is {shown(text)}, one token, which leaves nothing to predict; remove it')
        return self.example(item, ids, range(max(1, len(self.begin)), len(ids)), image_starts=NO_IMAGES)

    def shown(self, stage):
        """How an example of stage a1 or a2 is written, as text with {image}, {caption}, {question} and {answer}."""
        begin = self.tokenizer.decode(self.begin)
        if stage == 'a1':
            return f'{begin}{{image}}\n{{caption}}{self.format.end}'
        before, after = self.format.user
        after += self.think_block
        return f'{begin}{before}{{image}}\n{{question}}{after}{{answer}}{self.format.end}{self.format.between}'

    def difference(self):
        """One line when the tokenizer's own chat template writes other ids than this one, else ''."""
        return chat_difference(self.tokenizer, self.format, self.think_block)


def parts_of(item, turn):
    """The question of a turn, cut where its images stand: one part more than it has images."""
    question, _ = item.turns[turn]
    cuts = [offset for n, offset in item.image_places if n == turn]
    return [question[start:end] for start, end in zip([0, *cuts], [*cuts, len(question)])]


def texts_of(item):
    """Every text of an Item that a template may encode: questions are cut where their images stand."""
    texts = [item.system]
    for n, (_, answer) in enumerate(item.turns):
        texts += [*parts_of(item, n), answer]
    return texts
