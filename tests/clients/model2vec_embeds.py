"""Embed texts with model2vec: model2vec_embeds.py TEXTS FOLDER, the texts in JSON; writes JSON."""

import json
import sys

from model2vec import StaticModel

model = StaticModel.from_pretrained(sys.argv[2])
sys.stdout.write(json.dumps([vector.tolist() for vector in model.encode(json.loads(sys.argv[1]))]))
