"""The search over HTTP: a page, a JSON API (described at /openapi.json), pictures by number."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import FastAPI, File, Form, Request, UploadFile
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from cnclip_ft.search.batcher import Batcher, Busy, threads_for
from cnclip_ft.search.engine import Engine, Found
from cnclip_ft.search.guard import LOOPBACK, Guard, content_policy
from cnclip_ft.search.listing import read_bytes
from cnclip_ft.search.pictures import uploaded_pixels
from cnclip_ft.search.query import IMAGE_SHARE, MOST, WITHOUT_WEIGHT, Question
from cnclip_ft.search.thumbnails import Gone, Thumbnails
from data_tools.errors import DataFault, RequestError

MIB = 2**20
_TEXT = 4000  # characters; the tower reads the first fifty or so
_FORM = MIB  # what the other fields of an upload may take
_JSON = 64 * 1024


@dataclass(frozen=True)
class Limits:
    """What a stranger may send, and what a thumbnail may be made of; decoders at once bound the memory."""

    upload_bytes: int = 20 * MIB
    pixels: int = 50_000_000
    decoders: int = 2


Text = Annotated[str, Field(max_length=_TEXT)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
Top = Annotated[int, Field(ge=1, le=MOST)]


class Ask(BaseModel):
    """A question in words, for pictures like one of the index, or both."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    text: Text | None = Field(None, description="Words wanted.", examples=["一只在雪地里奔跑的狗"])
    without: Text | None = Field(None, alias="not", description="Words not wanted.")
    like: Annotated[int, Field(ge=0)] | None = Field(None, description="Number of a picture of the index.")
    image_share: Share = Field(IMAGE_SHARE, description="The picture's part where words and a picture are given.")
    not_weight: Weight = Field(WITHOUT_WEIGHT, description="How strongly `not` pushes away.")
    top: Top = 20


class Hit(BaseModel):
    number: int = Field(description="For /api/images/{number} and `like`.")
    id: str
    score: float = Field(description="Cosine of question and picture.")


class Answer(BaseModel):
    results: list[Hit] = Field(description="Best first.")
    milliseconds: float = Field(description="From the request's arrival, waiting included.")


class About(BaseModel):
    name: str
    images: int
    exact: bool = Field(description="False: answers come from an approximate index.")
    threshold: float | None = Field(description="Cosine from which on a picture counts as a match, where measured.")
    max_upload_bytes: int
    max_pixels: int
    max_text: int


class Problem(BaseModel):
    code: str = Field(description="A stable word.")
    detail: str


_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem} for status in (404, 413, 415, 422, 503)
}  # fmt: skip
_CODES = {404: "not-found", 405: "method", 413: "too-large", 415: "no-picture", 422: "bad-request", 503: "busy"}


def make_app(
    engine: Engine, *, threshold: float | None = None, limits: Limits | None = None, any_host: bool = False
) -> FastAPI:
    """The application over an opened engine.

    Args:
        any_host: answer to any host name: for a server that is meant to be reached from elsewhere.
    """
    limits = limits or Limits()
    batcher = Batcher(engine.ask, threads_for(engine.model.device.type))
    decoders = anyio.CapacityLimiter(limits.decoders)
    source = engine.index.info["source"]
    thumbnails = Thumbnails(read_bytes(source["kind"], source["path"]), engine.index.key, limits.pixels)
    page = resources.files("cnclip_ft.search").joinpath("page.html").read_text(encoding="utf-8")
    policy = {"Content-Security-Policy": content_policy(page), "Cache-Control": "no-cache"}

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with batcher:
            yield

    # FastAPI's own documentation pages load scripts from the network: only the description itself is served.
    app = FastAPI(title="cnclip-ft search", version="1", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(
        Guard, names=None if any_host else LOOPBACK, limit={"/api/search/image": limits.upload_bytes + _FORM}, other=_JSON
    )  # fmt: skip
    app.add_exception_handler(HTTPException, _http_problem)
    app.add_exception_handler(RequestValidationError, _validation_problem)

    @app.get("/", include_in_schema=False)
    def start() -> HTMLResponse:
        return HTMLResponse(page, headers=policy)

    @app.get("/favicon.ico", include_in_schema=False)
    def icon() -> Response:
        return Response(status_code=204)

    @app.get("/api/index")
    def about() -> About:
        """What is searched, and the limits."""
        return About(
            name=printable(source["name"]), images=len(engine.index), exact=engine.exact, threshold=threshold,
            max_upload_bytes=limits.upload_bytes, max_pixels=limits.pixels, max_text=_TEXT,
        )  # fmt: skip

    @app.post("/api/search", responses=_PROBLEMS)
    async def search(ask: Ask) -> Answer:
        """Search with words, with a picture of the index (`like`), or both."""
        began = time.perf_counter()
        question = Question(ask.text, ask.without, None, ask.like, ask.image_share, ask.not_weight, ask.top)
        return await _answer(question, began)

    @app.post("/api/search/image", responses=_PROBLEMS)
    async def search_image(
        image: Annotated[UploadFile, File(description="A picture file.")],
        text: Annotated[str | None, Form(max_length=_TEXT)] = None,
        without: Annotated[str | None, Form(alias="not", max_length=_TEXT)] = None,
        image_share: Annotated[float, Form(ge=0, le=1, allow_inf_nan=False)] = IMAGE_SHARE,
        not_weight: Annotated[float, Form(ge=0, le=2, allow_inf_nan=False)] = WITHOUT_WEIGHT,
        top: Annotated[int, Form(ge=1, le=MOST)] = 20,
    ) -> Answer:
        """Search with a picture of your own, and words beside it if you like."""
        began = time.perf_counter()
        data = await image.read(limits.upload_bytes + 1)
        if len(data) > limits.upload_bytes:
            raise HTTPException(413, f"the picture has more than {limits.upload_bytes / MIB:.1f} MiB")
        try:
            pixels = await anyio.to_thread.run_sync(
                uploaded_pixels, data, engine.model.image_size, limits.pixels, limiter=decoders
            )
        except DataFault as error:
            raise HTTPException(413 if error.kind == "image-too-large" else 415, printable(error.problem)) from None
        return await _answer(Question(text, without, pixels, None, image_share, not_weight, top), began)

    async def _answer(question: Question, began: float) -> Answer:
        try:
            answer = await batcher.ask(question)
        except Busy:
            raise HTTPException(503, "too many questions wait; ask again in a moment") from None
        if isinstance(answer, RequestError):
            raise HTTPException(422, str(answer))
        return Answer(results=[_hit(found) for found in answer], milliseconds=(time.perf_counter() - began) * 1e3)

    @app.get("/api/images/{number}", responses={200: {"content": {"image/jpeg": {}}}, 404: {"model": Problem}},
             response_class=Response)  # fmt: skip
    async def image(
        request: Request, number: Annotated[int, InPath()], size: Literal["small", "large"] = "small"
    ) -> Response:
        """A picture of the index, made small; 404 where it is not there any more."""
        try:
            tag = f'"{engine.index.item(number)[1]}-{size}"'
            headers = {"ETag": tag, "Cache-Control": "private, max-age=600"}
            if request.headers.get("if-none-match") == tag:
                return Response(status_code=304, headers=headers)
            data = await anyio.to_thread.run_sync(thumbnails.get, number, size, limiter=decoders)
        except IndexError:
            raise HTTPException(404, f"no picture of this number: there are {len(engine.index):,}, from 0") from None
        except Gone as error:
            return _problem(404, printable(str(error)), "gone")
        return Response(data, media_type="image/jpeg", headers=headers)

    return app


def printable(text: str) -> str:
    """Text that UTF-8 can carry: a file name may hold bytes that are none."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _hit(found: Found) -> Hit:
    return Hit(number=found.number, id=printable(str(found.key)), score=round(found.score, 6))


def _problem(status: int, detail: str, code: str | None = None) -> JSONResponse:
    return JSONResponse({"code": code or _CODES.get(status, "refused"), "detail": detail}, status)


async def _http_problem(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _problem(error.status_code, str(error.detail))


async def _validation_problem(_: Request, error: Exception) -> JSONResponse:
    """What is wrong and where; never what was sent, which may be large or no text at all."""
    assert isinstance(error, RequestValidationError)
    faults = [f"{'.'.join(map(str, fault['loc'][1:]))[:60]}: {fault['msg'][:200]}" for fault in error.errors()[:5]]
    return _problem(422, printable("; ".join(faults)))
