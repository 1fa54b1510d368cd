#!/usr/bin/env bash
# Trains ViT-B-16 and EVA02-B-16 at full size for 20 steps on shards of real photos, exports each
# run and loads the file in open_clip.
#   tools/check_photos.sh FOLDER_OF_SHARDS [...]
set -euo pipefail
PYTHON=${PYTHON:-.venv/bin/python}
for model in ViT-B-16 EVA02-B-16; do
  for shards in "$@"; do
    name="photos_${model}_$(basename "$shards")"
    "$PYTHON" -m gradeclip_ft train name="$name" model=open_clip model.name="$model" \
      model.weights=random data=coco_captions data.shards="$shards" data.batch_size=4 \
      data.workers=1 trainer.max_steps=20 trainer.log_every=5 optim.schedule.warmup=0 'evaluator=[]'
    "$PYTHON" -m gradeclip_ft export run="$name" format=pt
    "$PYTHON" - "$model" "$name" <<'CHECK'
import sys
import open_clip, torch
from gradeclip_ft.models.load import load_clip

model, name = sys.argv[1:]
theirs = open_clip.create_model(model, pretrained=f"exports/{name}/open_clip_model.pt").eval()
ours = load_clip(model, f"runs/{name}/weights.safetensors")
images = torch.rand(2, 3, 224, 224)
texts = ours.tokenizer(["a dog", "two people on a beach"])
with torch.no_grad():
    image = (theirs.encode_image(images) - ours.clip.image.encode(images)).abs().max()
    text = (theirs.encode_text(texts) - ours.clip.text.encode(texts)).abs().max()
print(f"{name}: loads in open_clip; largest difference image {image:.1e}, text {text:.1e}")
CHECK
  done
done
