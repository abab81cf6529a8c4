# The emoji's shards for Track B: every picture with its name and kind, every name as four voices say it at two speeds.
# $ python build_b2.py configs/b2_emoji.py
# 76 CPU seconds. 7 gates; 14,742 items of 14,720 files.
data_json = 'data/emoji/captions.json'
image_root = 'data/emoji'
manifests = ('data/emoji/speech/manifest.jsonl',)
audit_dir = 'out/b1_emoji'
llm = 'HuggingFaceTB/SmolLM2-135M-Instruct'
image_codec = 'data/emoji/image_codec'
audio_codec = 'data/emoji/audio_codec'
out_dir = 'out/b2_emoji'
n_eval = 256                   # of each modality: what B4 measures its write tasks on
max_seq_len = 256
