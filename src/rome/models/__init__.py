"""Models that map images in [0, 1] to logits, with the normalisation inside: building, saving and loading them.

May import experts, data, threats and core.
"""

from rome.core.files import file_hash
from rome.models.building import ModelSettings, build_model, create_model, keeps_experts
from rome.models.classifier import Classifier
from rome.models.files import load_experts, load_model, save_experts, save_model
from rome.models.loading import load_weights, read_tensors, weights_file
