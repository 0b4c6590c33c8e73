# ruff: noqa: E501 - a call is a line
"""Single calls as programs written for transformers make them, with what each may name.

`make test-peers --record` keeps what transformers 4.49 answers in tests/reference/compat/calls.json.
"""

import importlib
import io
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "tokenizer.json")

CALLS = """
# models: what they are
type(model).__name__, model.base_model_prefix, model.main_input_name, model.config_class.__name__
model.projection_dim, model.text_embed_dim, model.vision_embed_dim, model.projection_intermediate_dim
model.base_model is model, model.device.type, str(model.dtype), model.training
model.num_parameters(), model.num_parameters(only_trainable=True), model.num_parameters(exclude_embeddings=True)
model.get_memory_footprint() > model.num_parameters() * 4 - 1
model.name_or_path == checkpoint
model.get_output_embeddings(), model.get_position_embeddings.__name__
model.supports_gradient_checkpointing, model.is_gradient_checkpointing
[name for name, _ in model.named_children()]
text.get_input_embeddings().weight.shape, vision.get_input_embeddings().projection.weight.shape
sorted(model.state_dict())[::40]
model.can_generate()
model.logit_scale.shape, model.logit_scale.requires_grad

# models: towers within, flags, outputs
model.text_model(input_ids=x['input_ids'], return_dict=True).last_hidden_state.shape
model.text_model(x['input_ids'], x['attention_mask']).keys()
len(model.text_model(input_ids=x['input_ids'], output_attentions=True, output_hidden_states=True, return_dict=False))
model.vision_model(pixel_values=x['pixel_values'], output_attentions=True, return_dict=True).attentions[1].shape
model.vision_model(x['pixel_values'])[1].shape
model.vision_model(x['pixel_values'], output_hidden_states=True).hidden_states[0].shape
len(model(**x, return_dict=False)), type(model(**x, return_dict=False)).__name__
model(**x, return_loss=True).loss.shape
list(model(**x, output_segmentation=True))
model(**x)[0].shape, model(**x)['logits_per_text'].shape, len(model(**x)), 'loss' in model(**x)
[type(o).__name__ for o in (model(**x), model(**x).text_model_output)]
(lambda o: (setattr(o, 'extra', 3), o.extra, o['logits_per_image'].shape, o[1:3][0].shape))(model(**x))
model.get_text_features(x['input_ids']).shape, model.get_image_features(x['pixel_values']).shape
text(x['input_ids']).pooler_output.shape, vision(pixel_values=x['pixel_values']).pooler_output.shape
isinstance(model(**x), dict), list(model(**x).items())[0][0], type(model(**x).to_tuple()).__name__

# models: loading, saving, changing
(model.save_pretrained(folder, save_function=torch.save), sorted(f for f in os.listdir(folder) if f.endswith(('json', 'ors'))))
model.save_pretrained(folder, True)
model.save_pretrained(folder, is_main_process=True, state_dict=None, push_to_hub=False, max_shard_size='5GB', variant=None)
type(lib.GroupViTModel.from_pretrained(pretrained_model_name_or_path=checkpoint, variant=None, use_auth_token=None)).__name__
lib.GroupViTModel.from_pretrained(checkpoint, torch_dtype=torch.float16).dtype
lib.GroupViTModel.from_pretrained(checkpoint, config=config, state_dict=None, force_download=False, revision='main').training
lib.GroupViTModel.from_pretrained(checkpoint, output_attentions=True).config.output_attentions
lib.GroupViTModel.from_pretrained(checkpoint, torchscript=True).config.torchscript
lib.GroupViTTextModel.from_pretrained(checkpoint).config.model_type, lib.GroupViTVisionModel.from_pretrained(checkpoint).dtype
lib.AutoModel.from_pretrained(checkpoint).__class__.__name__, type(lib.AutoModel.from_config(config)).__name__
type(lib.GroupViTModel._from_config(config)).__name__
(lambda m: (m.gradient_checkpointing_enable(), m.is_gradient_checkpointing, m.gradient_checkpointing_disable()))(fresh())
(lambda m: m.half().dtype)(fresh())
(lambda m: [m.tie_weights(), m.post_init(), m.eval().training])(fresh())
(lambda m: (m.requires_grad_(False), m.num_parameters(only_trainable=True)))(fresh())
(lambda m: m.resize_token_embeddings(570).weight.shape)(lib.GroupViTTextModel.from_pretrained(checkpoint))
(lambda m: (m.set_input_embeddings(torch.nn.Embedding(7, 24)), m.get_input_embeddings().weight.shape))(lib.GroupViTTextModel.from_pretrained(checkpoint))
(lambda m: m.load_state_dict(model.state_dict()))(fresh())

# logging
(lib.logging.set_verbosity_info(), lib.logging.get_verbosity(), lib.logging.set_verbosity_error(), lib.logging.get_verbosity())
lib.logging.get_logger('a.b').name, lib.logging.WARNING, lib.logging.disable_progress_bar(), lib.logging.enable_progress_bar()
(lib.logging.set_verbosity(30), lib.logging.set_verbosity_warning(), lib.logging.get_verbosity())

# configurations
config.model_type, config.is_composition if hasattr(config, 'is_composition') else None, config.is_encoder_decoder
config.num_labels, config.id2label, config.label2id, config.problem_type
config.use_return_dict, config.output_hidden_states, config.output_segmentation, config.torchscript
config.name_or_path == checkpoint, config.architectures
(setattr(config, 'note', {'a': 1}), config.save_pretrained(folder, push_to_hub=False), lib.GroupViTConfig.from_pretrained(folder).note)
sorted(lib.GroupViTTextConfig(hidden_size=8, num_attention_heads=2).to_diff_dict())[:3]
config.to_dict()['projection_dim'], type(config.to_dict()['text_config']).__name__
lib.GroupViTConfig.from_dict(config.to_dict()).projection_dim, lib.GroupViTConfig.from_dict({'projection_dim': 9}, foo=1).projection_dim
lib.GroupViTConfig.from_dict({'projection_dim': 9, 'x': 2}, return_unused_kwargs=True, projection_dim=7)[0].projection_dim
lib.GroupViTVisionConfig().depths, lib.GroupViTTextConfig().eos_token_id, lib.GroupViTConfig().projection_dim
lib.GroupViTConfig.from_text_vision_configs(lib.GroupViTTextConfig(vocab_size=9), lib.GroupViTVisionConfig()).text_config.vocab_size
(lambda c: (c.update({'projection_dim': 5}), c.projection_dim))(lib.GroupViTConfig())
lib.AutoConfig.from_pretrained(checkpoint).__class__.__name__
lib.GroupViTConfig.get_config_dict(checkpoint)[0]['projection_dim']
lib.GroupViTConfig.from_pretrained(checkpoint) == lib.GroupViTConfig.from_pretrained(checkpoint), config != lib.GroupViTConfig()
'projection_dim' in config.to_json_string(), json.loads(config.to_json_string(use_diff=False))['projection_dim']
(config.to_json_file(folder + '/c.json'), lib.GroupViTConfig.from_json_file(folder + '/c.json').projection_dim)
hasattr(config, 'nothing'), getattr(config, 'nothing', 5)

# tokenizers: calls
T('a cat')['input_ids'], T('a cat').input_ids, list(T('a cat'))
T('a cat', return_length=True)['length'], T(['a', 'a cat'], return_length=True).length
T('a cat', truncation=True, padding='max_length', max_length=9, return_length=True, return_overflowing_tokens=False, return_tensors='pt')['length']
T('a cat', return_token_type_ids=False, return_attention_mask=False, verbose=False).keys()
T('a cat', return_special_tokens_mask=True)['special_tokens_mask']
T('a cat', return_offsets_mapping=True)['offset_mapping']
np.shape(T(['a', 'a cat on a mat'], padding=True, pad_to_multiple_of=8)['input_ids'])
T('a', 'b')['input_ids'], T(text='a', text_pair='b', add_special_tokens=False).input_ids
T(['a', 'b'], ['c', 'd'])['input_ids']
T(['green', 'trees'], is_split_into_words=True).input_ids
T(['a photo of a red bus'], max_length=6, truncation=True, stride=2, return_overflowing_tokens=True)['overflow_to_sample_mapping']
T(['a photo of a red bus'], max_length=6, truncation=True, return_overflowing_tokens=True)['input_ids']
T.encode('a', 'b'), T.encode('a cat', add_special_tokens=False), T.encode('a cat', return_tensors='np').shape
T.encode('a photo of a red bus', max_length=5, truncation=True), T.encode('a', padding='max_length', max_length=6)
T.encode_plus('a cat')['input_ids'], T.encode_plus('a', 'b', return_tensors='pt')['attention_mask'].shape
T.batch_encode_plus(['a', 'b'])['input_ids'], T.batch_encode_plus([('a', 'b')]).input_ids
T.pad({'input_ids': [[1], [1, 2]]})['attention_mask'], T.pad([{'input_ids': [1]}, {'input_ids': [1, 2]}], padding='max_length', max_length=4)['input_ids']
T.pad({'input_ids': [[1], [1, 2]]}, return_tensors='np')['input_ids'].dtype
type(T('a', return_tensors='np')['input_ids']).__name__, T('a', return_tensors='pt').input_ids.dtype

# tokenizers: encodings
T('a').data, T('a cat').tokens(), T('a cat').word_ids(), T('a').is_fast, T('a').n_sequences
T('a photo').char_to_token(2), T('a photo').token_to_word(2), tuple(T('a photo').token_to_chars(2)), T('a photo').char_to_word(3)
tuple(T('a photo').word_to_chars(1)), tuple(T('a photo').word_to_tokens(1)), T('a', 'b').sequence_ids()
(lambda e: (e.convert_to_tensors('pt'), e['input_ids'].shape))(T('a cat'))
type(T(['a'], return_tensors='pt').to('cpu')).__name__, T(['a'], return_tensors='pt').to('cpu')['input_ids'].device.type
T('a cat')[0].tokens, len(T(['a', 'b']).encodings)
(lambda e: (e.pop('attention_mask'), list(e), 'input_ids' in e, len(e)))(T('a cat'))
dict(T('a')), {**T('a')}, isinstance(T('a'), Mapping)

# tokenizers: vocabulary, special tokens, decoding
len(T), T.vocab_size, len(T.get_vocab()), T.get_added_vocab(), T.is_fast, T.model_max_length
T.special_tokens_map, T.all_special_tokens, T.all_special_ids, T.additional_special_tokens
T.bos_token, T.eos_token, T.pad_token, T.unk_token, T.bos_token_id, T.pad_token_id, T.cls_token, T.mask_token_id, T.sep_token
T.padding_side, T.truncation_side, T.model_input_names, T.num_special_tokens_to_add(), T.max_len_single_sentence
T.tokenize('a photo'), T.convert_tokens_to_ids(['a</w>', '<|endoftext|>']), T.convert_tokens_to_ids('a</w>'), T.convert_ids_to_tokens([64, 559])
T.convert_ids_to_tokens([64, 559], skip_special_tokens=True), T.convert_ids_to_tokens(64)
T.convert_tokens_to_string(['a</w>', 'cat</w>'])
T.decode([64, 320, 559]), T.decode(torch.tensor([64, 559]), skip_special_tokens=True), T.decode([64], clean_up_tokenization_spaces=False)
T.batch_decode([[64], [65, 559]], skip_special_tokens=True), T.batch_decode(T(['a', 'b'], return_tensors='pt').input_ids)
T.build_inputs_with_special_tokens([1, 2]), T.build_inputs_with_special_tokens([1], [2])
T.get_special_tokens_mask([558, 64, 559], already_has_special_tokens=True)
T.create_token_type_ids_from_sequences([1, 2]), T.prepare_for_model([64, 65])['input_ids']
(lambda t: (t.add_tokens(['<x>']), len(t), t.convert_tokens_to_ids('<x>'), t('a <x>').input_ids))(tokenizer())
(lambda t: (t.add_special_tokens({'additional_special_tokens': ['<y>']}), t.additional_special_tokens, t.decode(t('a <y>').input_ids, skip_special_tokens=True)))(tokenizer())
(lambda t: (setattr(t, 'pad_token', '!'), t.pad_token_id, t(['a', 'a b'], padding=True).input_ids[0][-1]))(tokenizer())
(lambda t: (setattr(t, 'padding_side', 'left'), t(['a', 'a b'], padding=True).attention_mask))(tokenizer())
[os.path.basename(f) for f in T.save_pretrained(folder)], [os.path.basename(f) for f in T.save_vocabulary(folder)]
type(lib.AutoTokenizer.from_pretrained(checkpoint)).__name__.removesuffix('Fast'), lib.CLIPTokenizerFast.from_pretrained(pretrained_model_name_or_path=checkpoint, model_max_length=7).model_max_length
T.init_kwargs['model_max_length'], T.name_or_path == checkpoint, T.vocab['a</w>']

# image processors and processors
np.shape(ip(image)['pixel_values']), np.shape(ip([image, image]).pixel_values), type(ip(image, return_tensors='np').pixel_values).__name__
np.shape(ip([[image]])['pixel_values'])
(lambda i: (setattr(i, 'crop_size', {'height': 20, 'width': 24}), np.shape(i(image)['pixel_values'])))(lib.CLIPImageProcessor())
ip.size, ip.crop_size, ip.do_resize, ip.image_mean, ip.resample, ip.do_convert_rgb, ip.rescale_factor, ip.model_input_names
lib.CLIPImageProcessor(size=30, crop_size=28).size, lib.CLIPImageProcessor(size=30, crop_size=28).crop_size
[name for name in sorted(ip.to_dict()) if name[0] != '_'][:6], json.loads(ip.to_json_string())['size']
ip.resize(np.zeros((20, 30, 3), np.uint8), {'shortest_edge': 10}).shape, ip.center_crop(np.zeros((20, 30, 3), np.uint8), {'height': 8, 'width': 8}).shape
ip.rescale(np.full((2, 2, 3), 255, np.uint8), 1 / 255).max(), ip.normalize(np.ones((2, 2, 3)), [1, 1, 1], [2, 2, 2]).max()
ip.preprocess(image, size={'shortest_edge': 10}, crop_size={'height': 8, 'width': 8}, return_tensors='pt')['pixel_values'].shape
type(ip(image)).__name__, list(ip(image, return_tensors='pt').to('cpu').keys()), ip(image, return_tensors='pt').to(torch.float16)['pixel_values'].dtype
lib.CLIPImageProcessor.from_dict(ip.to_dict()).size, lib.CLIPImageProcessor.from_pretrained(checkpoint, do_resize=False).do_resize
type(p.image_processor).__name__.removesuffix('Pil').removesuffix('Fast'), type(p.tokenizer).__name__.removesuffix('Fast')
p.model_input_names, list(p(text='a', images=image, return_tensors='pt')), list(p(images=image)), list(p('a'))
p.decode([64, 559]), p.batch_decode([[64], [559]], skip_special_tokens=True), p.tokenizer is p.tokenizer
type(lib.CLIPProcessor(lib.CLIPImageProcessor(), T)).__name__, type(lib.CLIPProcessor(image_processor=ip, tokenizer=T)).__name__
p(text=['a', 'b c'], padding='max_length', max_length=7, truncation=True, return_tensors='np')['input_ids'].shape
p(text=['a'], images=[image, image], return_tensors='pt', padding=True).to('cpu')['pixel_values'].shape
type(p.feature_extractor).__name__, type(lib.CLIPProcessor(feature_extractor=ip, tokenizer=T)).__name__
lib.CLIPFeatureExtractor().size, type(lib.AutoProcessor.from_pretrained(checkpoint)).__name__
(p.save_pretrained(folder) is not None, lib.CLIPProcessor.from_pretrained(folder).tokenizer.model_max_length)
"""

# Calls that answer otherwise on purpose: the beginning of their line in docs/differences.md, and our answer.
DIFFERENT: dict[str, tuple[str, Any]] = {
    "[os.path.basename(f) for f in T.save_pretrained(folder)], [os.path.basename(f) for f in T.save_vocabulary(folder)]": (
        "`save_pretrained` of a tokenizer",
        ["tuple", ["list", *TOKENIZER_FILES], ["list", "vocab.json", "merges.txt"]],
    ),
}


def listed() -> list[str]:
    return [line for line in CALLS.splitlines() if line and not line.startswith("#")]


def namespace(library: str, checkpoint: str, folder: str) -> dict[str, Any]:
    """Returns what calls may name; `T`, `p`, `ip`: tokenizer, processor, image processor; `fresh`: another model."""
    lib = importlib.import_module(library)
    processor = lib.CLIPProcessor.from_pretrained(checkpoint)
    image = Image.fromarray((np.arange(40 * 50 * 3).reshape(40, 50, 3) % 251).astype(np.uint8))
    return {
        "lib": lib,
        "model": lib.GroupViTModel.from_pretrained(checkpoint).eval(),
        "text": lib.GroupViTTextModel.from_pretrained(checkpoint).eval(),
        "vision": lib.GroupViTVisionModel.from_pretrained(checkpoint).eval(),
        "config": lib.GroupViTConfig.from_pretrained(checkpoint),
        "fresh": lambda: lib.GroupViTModel.from_pretrained(checkpoint),
        "tokenizer": lambda: lib.CLIPTokenizerFast.from_pretrained(checkpoint),
        "T": lib.CLIPTokenizerFast.from_pretrained(checkpoint),
        "p": processor,
        "ip": lib.CLIPImageProcessor.from_pretrained(checkpoint),
        "image": image,
        "x": processor(text=["a", "a cat"], images=[image, image], return_tensors="pt", padding=True),
        "checkpoint": checkpoint,
        "folder": folder,
        "np": np,
        "torch": torch,
        "os": os,
        "io": io,
        "json": json,
        "Mapping": Mapping,
    }


def plain(value: Any) -> Any:
    """Returns a value as JSON keeps it, with the names of its types where JSON has none."""
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, torch.Size):
        return plain(tuple(value))
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, np.generic):
        return [f"numpy {value.dtype}", plain(value.item())]
    if isinstance(value, np.ndarray | torch.Tensor):
        return [type(value).__name__, str(value.dtype), plain(value.tolist())]
    if isinstance(value, tuple):
        return ["tuple", *map(plain, value)] if type(value) is tuple else [type(value).__name__, *map(plain, value)]
    if isinstance(value, list):
        return ["list", *map(plain, value)]
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if type(value).__name__ in ("odict_keys", "dict_keys", "KeysView"):
        return ["keys", *map(str, value)]
    return f"<{type(value).__name__}>"


def answers(library: str, checkpoint: str) -> dict[str, Any]:
    """Returns the answer to every call, or the name and the sentence of its error."""
    found = {}
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        folder = Path(place, "saved")
        folder.mkdir()
        variables = namespace(library, checkpoint, str(folder))
        for call in listed():
            try:
                found[call] = json.loads(json.dumps(plain(eval(call, variables))))
            except Exception as error:
                found[call] = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    return found
