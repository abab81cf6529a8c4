# Emoji and their names said aloud for SmolLM2-135M: a picture of 64 pixels is 64 codes of 1,024, a name of up to 1.3 s
# is 26 frames x 2 codes of 512. Both codecs are made on the spot; what is measured here, neither has seen.
# $ python uti.py configs/b1_emoji.py
# $ python uti.py configs/b1_emoji.py --llm=FOLDER    # where no hub can be reached; b2 and b3 want the same
# 15 CPU seconds. 16 gates: 19.8 dB and SSIM 0.76, SI-SNR 2.8 dB; of what is said 99 % can still be told apart.
llm = 'HuggingFaceTB/SmolLM2-135M-Instruct'
image_codec = 'data/emoji/image_codec'     # of python -m emoji.codecs
audio_codec = 'data/emoji/audio_codec'
clip_seconds = 1.3
data_json = 'data/emoji/eval_known.json'   # of python -m emoji.pictures
image_root = 'data/emoji'
manifest_jsonl = 'data/emoji/speech/new.jsonl'   # of python -m emoji.speech
out_dir = 'out/b1_emoji'
n_items = 256
gate_psnr = 19.0
gate_ssim = 0.7
gate_si_snr = 2.0
gate_log_mel = 0.75            # silence would have 1.34
