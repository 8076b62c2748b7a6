"""A finished run on the Hugging Face hub: which files, with which card, and the upload."""

from promptkd.publish.bundle import Bundle, collect
from promptkd.publish.card import Published, model_card
from promptkd.publish.origin import hub_origin
from promptkd.publish.upload import upload
