"""What is asked and answered over HTTP, as the description at /openapi.json says it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from cnclip_ft.search.engine.query import DEEPEST, IMAGE_SHARE, MOST, WITHOUT_WEIGHT

TEXT = 4000  # characters; the tower reads the first fifty or so

Text = Annotated[str, Field(max_length=TEXT)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
Top = Annotated[int, Field(ge=1, le=MOST)]
Cosine = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
Skip = Annotated[int, Field(ge=0, le=DEEPEST)]
ALL = -1.0  # the lowest cosine
Conditions = Annotated[list[Annotated[str, Field(max_length=500)]], Field(max_length=50)]
IMAGE_SHARE_WORDS = "The picture's part where words and a picture are given."
NOT_WEIGHT_WORDS = "How strongly `not` pushes away."
TOP_WORDS = "How many pictures to find."
AT_LEAST_WORDS = "Cosine from which on a picture is found; from -1 all are."
SKIP_WORDS = "How many of the best to leave out: those had so far."
WHERE_WORDS = (
    "What must be kept of a picture: `column=value`, `column<number`; several values of one column: any of them."
)


class Ask(BaseModel):
    """A question in words, for pictures like one of the index, or both."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    text: Text | None = Field(None, description="Words wanted.", examples=["一只在雪地里奔跑的狗"])
    without: Text | None = Field(None, alias="not", description="Words not wanted.", examples=["草地"])
    like: Annotated[int, Field(ge=0)] | None = Field(None, description="Number of a picture of the index.")
    image_share: Share = Field(IMAGE_SHARE, description=IMAGE_SHARE_WORDS)
    not_weight: Weight = Field(WITHOUT_WEIGHT, description=NOT_WEIGHT_WORDS)
    top: Top = Field(20, description=TOP_WORDS)
    where: Conditions = Field([], description=WHERE_WORDS, examples=[["类目=女装", "价格<100"]])
    at_least: Cosine = Field(ALL, description=AT_LEAST_WORDS)
    skip: Skip = Field(0, description=SKIP_WORDS)


class Hit(BaseModel):
    number: int = Field(description="For /api/images/{number} and `like`.", examples=[17])
    id: str = Field(description="Path below the indexed folder, or id in the store.", examples=["2024/dog.jpg"])
    score: float = Field(description="Cosine of question and picture.", examples=[0.3127])
    columns: dict[str, str | int | float | bool] = Field(
        {},
        description="What the store keeps of the picture, and its `caption`.",
        examples=[{"类目": "女装", "价格": "99"}],
    )


class Choice(BaseModel):
    value: str = Field(examples=["女装"])
    images: int = Field(examples=[1200])


class Facet(BaseModel):
    """A column of few values, to choose from."""

    column: str = Field(examples=["类目"])
    choices: list[Choice] = Field(description="The most frequent first.")


class Answer(BaseModel):
    results: list[Hit] = Field(description="Best first.")
    matches: int | None = Field(
        description="How many pictures of the index meet `where` and `at_least`; null where an approximate index does "
        "not count.",
        examples=[137],
    )
    milliseconds: float = Field(description="From the request's arrival, waiting included.", examples=[42.5])


class Ground(BaseModel):
    """A question as `Ask` puts it, about one picture."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    text: Text | None = Field(None, description="Words wanted.", examples=["红色的伞"])
    without: Text | None = Field(None, alias="not", description="Words not wanted.")
    like: Annotated[int, Field(ge=0)] | None = Field(None, description="Number of a picture of the index.")
    image_share: Share = Field(IMAGE_SHARE, description=IMAGE_SHARE_WORDS)
    not_weight: Weight = Field(WITHOUT_WEIGHT, description=NOT_WEIGHT_WORDS)


class HeatMap(BaseModel):
    """Where in a picture a question is met."""

    part: tuple[float, float, float, float] = Field(
        description="What of the picture the map lies over, `x, y, width, height` in shares of it; beyond it nothing was seen.",
        examples=[(0.0, 0.0, 1.0, 1.0)],
    )
    values: list[list[float]] = Field(
        description="Rows of patches: 0 for the coldest of the picture to 1 for the hottest.",
        examples=[[[0.0, 0.2], [1.0, 0.4]]],
    )
    score: float = Field(description="Cosine of the hottest patch with the question.", examples=[0.2871])


class About(BaseModel):
    name: str = Field(description="Name of the folder or store that was indexed.", examples=["photos"])
    images: int = Field(examples=[100000])
    exact: bool = Field(description="False: answers come from an approximate index.")
    threshold: float | None = Field(description="Cosine from which on a picture counts as a match, where measured.")
    columns: list[str] = Field([], description="Names of the columns that are kept, for `where`.")
    facets: list[Facet] = Field([], description="Those of few values.")
    folder: str | None = Field(
        None, description="Where the indexed folder lies; said only where no other machine can ask."
    )
    heat: bool = Field(description="Whether the model can say where in a picture a question is met.")
    max_upload_bytes: int
    max_pixels: int
    max_text: int


class Problem(BaseModel):
    """Every refusal."""

    code: str = Field(description="A stable word.", examples=["bad-request"])
    detail: str = Field(
        description="What is wrong, in words.", examples=["top: Input should be less than or equal to 1000"]
    )


CODES = {
    400: "bad-request", 401: "password", 403: "foreign", 404: "not-found", 405: "method", 408: "too-slow", 413: "too-large",
    415: "no-picture", 421: "host", 422: "bad-request", 503: "busy",
}  # fmt: skip
_WORDS = {
    400: "The request cannot be parsed.",
    401: "The server asks for a password (HTTP basic authentication, any user name).",
    403: "Sent by a page of another site.",
    404: "There is no such picture, or it is gone, or has changed since.",
    405: "This path takes another method.",
    408: "The request did not arrive in time.",
    413: "More bytes or pixels than the server takes, or more work than it spends.",
    415: "No picture of a known format, or a damaged one.",
    421: "The server does not answer to this host name.",
    422: "A value is missing, of a wrong type or out of its range; or nothing is asked.",
    503: "Too much is waiting; ask again after `Retry-After` seconds.",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Responses for a route: the named ones, and those any request can meet."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": Problem, "description": _WORDS[status]} for status in sorted({401, 403, 405, 421, *statuses})
    }
    if 503 in found:
        found[503]["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return found


BYTES = {"type": "string", "format": "binary"}
