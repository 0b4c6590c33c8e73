"""Requests and answers of the API: their fields, with descriptions and examples for the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from groupvit_common.serving.problems import Problem

Include = Literal["label_map", "score_map", "group_map", "stages", "similarity", "overlay"]
Masks = Literal["none", "png", "rle", "polygons"]

_LABELS = "Labels to find: text with commas between, | before a synonym; or a list of such labels."
Words = str | list[str]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    backend: Literal["torch", "tf"] | None = Field(None, description="What computes; null: the server's first.")


class ImageRequest(_Request):
    """An image."""

    image: Annotated[bytes, Field(description="An image file: a file of a form, base64 or a data: URL in JSON.")]


class _Images(_Request):
    image: bytes | None = Field(None, description="An image file: a file of a form, base64 or a data: URL in JSON.")
    image_id: str | None = Field(
        None, max_length=100, description="Instead of an image, the id of one that was sent to /v1/images."
    )


class EmbedImageRequest(_Images):
    """An image, or the id of one."""


class EmbedTextRequest(_Request):
    """Texts."""

    texts: list[str] = Field(description="Texts as they are, without templates.", examples=[["a photo of a cat."]])


class ClassifyRequest(_Images):
    """An image and labels for all of it."""

    labels: Words | None = Field(None, description=_LABELS, examples=["cat, dog|puppy", ["cat", "dog|puppy"]])
    templates: Words | None = Field(
        None, description='Sentences around each word: "one", "seven", "eighty", or your own with {} in it.'
    )
    synonyms: Literal["mean", "max"] | None = Field(
        None, description="A label of several words is their mean, or as similar as the most similar of them."
    )

    @field_validator("labels", "background_labels", "templates", mode="before", check_fields=False)
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """A list as forms write it."""
        return _from_json(value) if isinstance(value, str) and value.lstrip().startswith("[") else value


class SegmentRequest(ClassifyRequest):
    """An image, labels, and how pixels get them. Options that are left out are the server's (`/v1/info`)."""

    background_labels: Words | None = Field(None, description="Labels whose pixels become background.")
    background: float | None = Field(
        None, ge=0, le=1, allow_inf_nan=False, description="Pixels whose best label scores less become background."
    )
    temperature: float | None = Field(
        None, gt=0, le=1000, allow_inf_nan=False, description="Above 1 confidence is lower, below 1 higher."
    )
    assignment: Literal["soft", "hard"] | None = Field(
        None, description="hard: a pixel takes the label of its largest group; soft: labels weighted by its groups."
    )
    top_k: int | None = Field(None, ge=1, le=1 << 20, description="Only so many labels, those most like the image.")
    refine: int | None = Field(
        None, ge=0, le=50, description="Let labels follow the image's edges (PAMR), so many times."
    )
    foreground: float | None = Field(
        None, ge=0, le=1, allow_inf_nan=False, description="Pixels are background unless labels have this fraction."
    )
    flip: bool | None = Field(None, description="Average with the mirrored image. Encodes the image again.")
    scales: list[Annotated[float, Field(gt=0, le=8, allow_inf_nan=False)]] | None = Field(
        None, max_length=8, description="Average over these multiples of the shorter side. Encodes the image again.",
        examples=[[0.75, 1, 1.25]],
    )  # fmt: skip
    shorter_side: int | None = Field(
        None, ge=1, le=8192, description="The image's shorter side for the model. Encodes the image again."
    )
    window: int | None = Field(
        None, ge=1, le=8192, description="The model sees windows of this side. Encodes the image again."
    )
    stride: int | None = Field(None, ge=1, le=8192, description="From one window to the next.")
    masks: Masks = Field("none", description="A mask for each label that has pixels, in this form.")
    include: list[Include] = Field(
        ["label_map"], max_length=len(get_args(Include)),
        description="Maps and images in the answer.",
    )  # fmt: skip
    opacity: float = Field(0.5, ge=0, le=1, allow_inf_nan=False, description="Of the colours in overlay.")

    @field_validator("include", "scales", mode="before")
    @classmethod
    def _divided(cls, value: Any) -> Any:
        """A list as forms write it: JSON, or with commas."""
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            return _from_json(value)
        return [part.strip() for part in value.split(",") if part.strip()]


# Fields of a request that are options of a segmenter. Those for which null is a value of its own.
OPTION_FIELDS = ("templates", "synonyms", "background", "temperature", "assignment", "top_k", "refine", "foreground",
                 "flip", "scales", "shorter_side", "window", "stride")  # fmt: skip
_NULL_MEANS_NONE = ("background", "assignment", "top_k", "foreground", "shorter_side", "window", "stride")


def checked(model: type[_Request], fields: dict[str, Any]) -> Any:
    """Returns the request of these fields, which are all text but for the image where they come from a form.

    Raises:
        Problem: a field that cannot be used, or that there is not.
    """
    if len(fields) > 2 * len(model.model_fields):
        raise Problem(
            422, "unusable", f"there are {len(fields):,} fields, of which this takes {len(model.model_fields)}"
        )
    # In a form, what is empty is left out.
    kept = ("texts", "include")
    given = {name: None if value in ("", "null") and name not in kept else value for name, value in fields.items()}
    for name in ("masks", "include", "opacity"):
        if given.get(name, "") is None:
            del given[name]
    if isinstance(given.get("texts"), str):
        given["texts"] = _from_json(str(given["texts"]))
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"][:1]) or "the request"
        if first["type"] == "extra_forbidden":
            known = ", ".join(sorted(model.model_fields))
            raise Problem(422, "unusable", f"there is no field {where[:40]!r}: there are {known}") from None
        message = first["msg"].removeprefix("Value error, ")
        raise Problem(422, "unusable", f"{where[:40]}: {message[:1].lower()}{message[1:]}") from None
    except RecursionError:
        raise Problem(422, "unusable", "the request is nested too deeply") from None


def options_of(request: ClassifyRequest) -> dict[str, Any]:
    """Returns the options of segmentation that a request gives."""
    given = {name: getattr(request, name) for name in OPTION_FIELDS if name in request.model_fields_set}
    return {name: value for name, value in given.items() if value is not None or name in _NULL_MEANS_NONE}


def _from_json(text: str) -> Any:
    import json

    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Problem(422, "unusable", "a list is not valid JSON") from None


# -- answers -----------------------------------------------------------------------------------------------------------


class Error(BaseModel):
    """The fault of a request."""

    code: str = Field(description="For programs.", examples=["too_large"])
    message: str = Field(description="One sentence for people.")


class ErrorAnswer(BaseModel):
    """The answer to a request that is refused."""

    error: Error


class ImageAnswer(BaseModel):
    """An image that is kept, encoded, for a while."""

    image_id: str = Field(description="For /v1/segment and others; as long as nobody else knows it, nobody else can.")
    width: int = Field(examples=[640])
    height: int = Field(examples=[480])
    groups: list[int] = Field(description="The number of groups of each stage.", examples=[[64, 8]])
    milliseconds: dict[str, float] = Field(description="wait, decode, encode")


class LabelAnswer(BaseModel):
    """A label of an answer; its index is the pixel value in label_map."""

    index: int
    name: str
    colour: str = Field(examples=["#e69f00"])
    probability: float | None = Field(description="Of the whole image; null for a background without a name.")
    pixel_share: float = Field(description="Fraction of the pixels, 0 to 1.")
    mask: Any = Field(
        None, description="As masks asks: base64 PNG, {size, counts} as COCO's run lengths, or lists of x, y, x, y, ..."
    )


class GroupAnswer(BaseModel):
    """A group of the last stage."""

    index: int
    label: int = Field(description="Index into labels.")
    scores: list[float] = Field(description="One for each label, 0 to 1.")
    pixel_share: float


class SimilarityAnswer(BaseModel):
    """Similarity of each place to a label, at the size at which the model sees the image."""

    label: str
    map: str = Field(description="Base64 PNG of 8 bits.")
    low: float = Field(description="Cosine similarity of value 0.")
    high: float = Field(description="Cosine similarity of value 255.")


class SegmentAnswer(BaseModel):
    """A segmented image; maps are base64 PNGs of the image's size, those that include asks for."""

    image_id: str | None
    width: int
    height: int
    has_background: bool
    labels: list[LabelAnswer]
    groups: list[GroupAnswer]
    label_map: str | None = Field(None, description="Pixel value: index of the label; palette, or 16 bits beyond 256.")
    score_map: str | None = Field(None, description="8 bits: the score of the pixel's label times 255.")
    group_map: str | None = Field(None, description="Pixel value: the group of the last stage; 16 bits beyond 256.")
    stages: list[str] | None = Field(None, description="group_map of each stage, the first one first.")
    similarity: list[SimilarityAnswer] | None = None
    overlay: str | None = Field(None, description="The image with its labels in colour and a legend.")
    milliseconds: dict[str, float] = Field(description="wait, decode, encode, texts, label, write")


class ClassAnswer(BaseModel):
    """A label and its probability for the whole image."""

    name: str
    probability: float


class ClassifyAnswer(BaseModel):
    """Labels, the most probable one first."""

    labels: list[ClassAnswer]


class EmbeddingAnswer(BaseModel):
    """An embedding of length 1."""

    embedding: list[float]


class EmbeddingsAnswer(BaseModel):
    """Embeddings of length 1, in the order of the texts."""

    embeddings: list[list[float]]
