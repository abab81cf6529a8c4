# The small world's shards: pictures with one caption, sounds with two, an eighth of the media held out.
# $ python build_b2.py configs/b2_small.py
# Under a CPU minute, nearly all of it the sound codec. 7 gates; 18,427 items of 16,400 media files, 5.1 MB.
from small.make import ensure

_small = ensure('captions', 'sounds', 'llm', 'image_codec', 'audio_codec')
data_json = f'{_small}/captions/data.json'
image_root = f'{_small}/captions/images'
manifests = (f'{_small}/sounds/manifest.jsonl',)
audit_dir = 'out/b1_small'
llm = f'{_small}/llm'
image_codec = f'{_small}/image_codec'
audio_codec = f'{_small}/audio_codec'
out_dir = 'out/b2_small'
n_eval = 256                   # of each modality: what B4 measures its write tasks on
eval_share = 0.125
max_seq_len = 512
