"""The search over HTTP: a page, a JSON API (described at /openapi.json), pictures by number."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from fastapi import FastAPI, File, Form, Header, Query, Request, UploadFile
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from cnclip_ft.grounding.finder import Decoded
from cnclip_ft.search.engine.engine import Engine, Found
from cnclip_ft.search.engine.query import IMAGE_SHARE, WITHOUT_WEIGHT, Question
from cnclip_ft.search.index.folder import Damaged
from cnclip_ft.search.index.milvus import Away
from cnclip_ft.search.web.batcher import Batcher, Busy, threads_for
from cnclip_ft.search.web.decoder import SIDES
from cnclip_ft.search.web.decoders import TOO_SLOW, Decoders
from cnclip_ft.search.web.gate import LOOPBACK, RETRY, Gate, content_policy
from cnclip_ft.search.web.messages import (
    ALL,
    AT_LEAST_WORDS,
    BYTES,
    CODES,
    IMAGE_SHARE_WORDS,
    NOT_WEIGHT_WORDS,
    SKIP_WORDS,
    TEXT,
    TOP_WORDS,
    WHERE_WORDS,
    About,
    Answer,
    Ask,
    Choice,
    Conditions,
    Cosine,
    Facet,
    Ground,
    HeatMap,
    Hit,
    Share,
    Skip,
    Text,
    Top,
    Weight,
    problems,
)
from cnclip_ft.search.web.page import read_page
from cnclip_ft.search.web.password import protect
from cnclip_ft.search.web.thumbnails import Gone, Thumbnails
from data_tools.columns import Where, parse_where
from data_tools.errors import DataFault, RequestError, printable

MIB = 2**20
_FORM = MIB  # what the other fields of an upload may take
_JSON = 64 * 1024
_TOO_MUCH = ("image-too-large", "too-many-scans", TOO_SLOW)
_NUMBER = 2**31  # pictures; more digits than any index has are refused before they are turned into a number


@dataclass(frozen=True)
class Limits:
    """What a stranger may send, and what a thumbnail may be made of; decoders at once bound the memory.

    Args:
        decoders: processes for pictures that are sent, and as many for thumbnails, so that neither waits for the other.
        decode_seconds: that one picture may take. body_seconds: that a request may take to arrive.
    """

    upload_bytes: int = 20 * MIB
    pixels: int = 50_000_000
    decoders: int = 2
    decode_seconds: float = 5.0
    body_seconds: float = 30.0


def make_app(
    engine: Engine,
    *,
    threshold: float | None = None,
    limits: Limits | None = None,
    names: frozenset[str] = LOOPBACK,
    allowed: frozenset[str] = frozenset(),
    addresses: bool = False,
    password: str | None = None,
) -> FastAPI:
    """The application over an opened engine.

    Args:
        names: host names it answers to, and `allowed`, whose pages may ask too (`guard.ANY`: all names). addresses: and
            to any address.
        password: asked for before anything is answered.
    """
    limits = limits or Limits()
    batcher = Batcher(engine.ask, threads_for(engine.model.device.type))
    sent, shown = (Decoders(limits.decoders, waiting, limits.decode_seconds, limits.pixels) for waiting in (16, 512))
    source = engine.gallery.info["source"]
    thumbnails = Thumbnails(source["kind"], source["path"], engine.gallery.item, shown)
    looking = asyncio.Lock()  # one picture at a time through the image tower: questions come first
    private = not addresses and not allowed and names == LOOPBACK
    page = read_page()
    policy = {"Content-Security-Policy": content_policy(page), "Cache-Control": "no-cache"}

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with batcher, sent, shown:
            yield

    # FastAPI's own documentation pages load scripts from the network: only the description itself is served.
    app = FastAPI(
        title="cnclip-ft search",
        version="1.4",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        summary="Search pictures with words and pictures.",
        servers=[{"url": "/", "description": "This server."}],
        generate_unique_id_function=lambda route: route.name,
    )
    if password is not None:
        protect(app, password)
    app.add_middleware(
        Gate,
        names=names | allowed,
        addresses=addresses,
        origins=allowed,
        seconds=limits.body_seconds,
        limit={"/api/search/image": limits.upload_bytes + _FORM},
        other=_JSON,
    )
    app.add_exception_handler(HTTPException, _http_problem)
    app.add_exception_handler(RequestValidationError, _validation_problem)
    app.add_exception_handler(Busy, _busy)
    app.add_exception_handler(Damaged, _damaged)
    app.add_exception_handler(Away, _away)
    app.add_exception_handler(Gone, _gone)

    @app.get("/", include_in_schema=False)
    def start() -> HTMLResponse:
        return HTMLResponse(page, headers=policy)

    @app.get("/favicon.ico", include_in_schema=False)
    def icon() -> Response:
        return Response(status_code=204)

    @app.get("/api/index", responses=problems(), tags=["search"])
    def get_index() -> About:
        """What is searched, and the limits."""
        return About(
            name=printable(source["name"]),
            images=len(engine.gallery),
            exact=engine.exact,
            threshold=threshold,
            max_upload_bytes=limits.upload_bytes,
            max_pixels=limits.pixels,
            max_text=TEXT,
            folder=printable(source["path"]) if private and source["kind"] == "folder" else None,
            heat=engine.has_heat,
            columns=[printable(name) for name in engine.gallery.names],
            facets=[
                Facet(column=name, choices=[Choice(value=str(value), images=count) for value, count in values])
                for name, values in engine.gallery.offered().items()
            ],
        )

    @app.post("/api/search", responses=problems(400, 408, 413, 422, 503), tags=["search"])
    async def search(ask: Ask) -> Answer:
        """Search with words, with a picture of the index (`like`), or both."""
        began = time.perf_counter()
        question = Question(
            ask.text,
            ask.without,
            None,
            ask.like,
            ask.image_share,
            ask.not_weight,
            ask.top,
            _where(ask.where),
            _limit(ask.at_least),
            ask.skip,
        )
        return await _answer(question, began)

    @app.post("/api/search/image", responses=problems(400, 408, 413, 415, 422, 503), tags=["search"])
    async def search_image(
        image: Annotated[UploadFile, File(description="A picture file.", json_schema_extra=_as_file)],
        text: Annotated[Text, Form(description="Words wanted.")] = "",
        without: Annotated[Text, Form(alias="not", description="Words not wanted.")] = "",
        image_share: Annotated[Share, Form(description=IMAGE_SHARE_WORDS)] = IMAGE_SHARE,
        not_weight: Annotated[Weight, Form(description=NOT_WEIGHT_WORDS)] = WITHOUT_WEIGHT,
        top: Annotated[Top, Form(description=TOP_WORDS)] = 20,
        where: Annotated[Conditions, Form(description=WHERE_WORDS)] = [],  # noqa: B006 - FastAPI makes a new one
        at_least: Annotated[Cosine, Form(description=AT_LEAST_WORDS)] = ALL,
        skip: Annotated[Skip, Form(description=SKIP_WORDS)] = 0,
    ) -> Answer:
        """Search with a picture of your own, and words beside it if you like."""
        began = time.perf_counter()
        wanted = _where(where)
        data = await image.read(limits.upload_bytes + 1)
        if len(data) > limits.upload_bytes:
            raise HTTPException(413, f"the picture has more than {limits.upload_bytes / MIB:.1f} MiB")
        picture = engine.model.image_tower.preprocessing
        try:
            fitted = await sent.run({"do": "fit", "how": picture.fitting}, data)
        except DataFault as error:
            raise HTTPException(413 if error.kind in _TOO_MUCH else 415, printable(error.problem)) from None
        pixels = np.frombuffer(bytearray(fitted), np.uint8, offset=SIDES.size).reshape(*SIDES.unpack_from(fitted), 3)
        packed = picture.pack(pixels)
        question = Question(text, without, packed, None, image_share, not_weight, top, wanted, _limit(at_least), skip)
        return await _answer(question, began)

    async def _answer(question: Question, began: float) -> Answer:
        answer = await batcher.ask(question)
        if isinstance(answer, (Damaged, Away)):
            raise answer
        if isinstance(answer, RequestError):
            raise HTTPException(422, str(answer))
        milliseconds = (time.perf_counter() - began) * 1e3
        return Answer(results=[_hit(found) for found in answer], matches=answer.matches, milliseconds=milliseconds)

    @app.get(
        "/api/images/{number}",
        response_class=Response,
        tags=["pictures"],
        responses={
            200: {"description": "A JPEG.", "content": {"image/jpeg": {"schema": BYTES}}},
            304: {"description": "It is still the one of `If-None-Match`."},
            **problems(404, 422, 503),
        },
    )
    async def get_image(
        number: Annotated[int, InPath(ge=0, lt=_NUMBER, description="As `results` name it.", examples=[17])],
        size: Annotated[Literal["small", "large"], Query(description="Longer side 360 or 1,600 pixels.")] = "small",
        if_none_match: Annotated[str, Header(description="`ETag` of an earlier answer.")] = "",
    ) -> Response:
        """A picture of the index, made small; 404 where it is not there any more."""
        try:
            tag = f'"{engine.gallery.item(number)[1]}-{size}"'
            headers = {"ETag": tag, "Cache-Control": "private, max-age=600"}
            if if_none_match == tag:
                return Response(status_code=304, headers=headers)
            data = await thumbnails.get(number, size)
        except IndexError:
            raise _no_picture(len(engine.gallery)) from None
        return Response(data, media_type="image/jpeg", headers=headers)

    @app.post("/api/images/{number}/heat", responses=problems(400, 404, 408, 413, 422, 503), tags=["pictures"])
    async def get_heat(
        number: Annotated[int, InPath(ge=0, lt=_NUMBER, description="As `results` name it.", examples=[17])],
        ground: Ground,
    ) -> HeatMap:
        """Where in a picture of the index a question is met: why it was found."""
        question = Question(ground.text, ground.without, None, ground.like, ground.image_share, ground.not_weight, 1)
        picture = engine.model.image_tower.preprocessing
        try:
            data = await thumbnails.fitted(number, picture.fitting)
        except IndexError:
            raise _no_picture(len(engine.gallery)) from None
        height, width = SIDES.unpack_from(data)
        sides = SIDES.unpack_from(data, SIDES.size)
        pixels = np.frombuffer(bytearray(data), np.uint8, offset=2 * SIDES.size).reshape(*sides, 3)
        decoded = Decoded(picture.pack(pixels), width, height)
        try:
            async with looking:
                found = await run_in_threadpool(engine.heat, question, decoded)
        except RequestError as error:
            raise HTTPException(422, printable(str(error))) from None
        low, high = float(found.values.min()), float(found.values.max())
        shares = (found.values - low) / (high - low) if high > low else np.zeros_like(found.values)
        return HeatMap(part=found.part, values=shares.round(3).tolist(), score=round(found.score, 6))

    return app


def _no_picture(count: int) -> HTTPException:
    return HTTPException(404, f"no picture of this number: there are {count:,}, from 0")


def _as_file(schema: dict[str, object]) -> None:
    """As generators of clients know a file; FastAPI names its content type only."""
    schema.pop("contentMediaType", None)
    schema.update(BYTES)


def _hit(found: Found) -> Hit:
    score = round(found.score, 6)
    return Hit(number=found.number, id=printable(str(found.key)), score=score, columns=found.columns)


def _limit(at_least: float) -> float | None:
    """None: nobody has to be counted."""
    return at_least if at_least > ALL else None


def _where(conditions: list[str]) -> Where:
    try:
        return parse_where(conditions)
    except RequestError as error:
        raise HTTPException(422, printable(str(error).replace("--where ", "where: "))) from None


def _problem(status: int, detail: str, code: str | None = None, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"code": code or CODES.get(status, "refused"), "detail": detail}, status, headers)


async def _http_problem(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _problem(error.status_code, str(error.detail), headers=dict(error.headers or {}))


async def _busy(_: Request, error: Exception) -> JSONResponse:
    return _problem(
        503, "too many wait; ask again in a moment", headers={name.decode(): value.decode() for name, value in (RETRY,)}
    )


async def _gone(_: Request, error: Exception) -> JSONResponse:
    return _problem(404, printable(str(error)), "gone")


async def _damaged(_: Request, error: Exception) -> JSONResponse:
    return _problem(503, printable(str(error)), "index-damaged")


async def _away(_: Request, error: Exception) -> JSONResponse:
    return _problem(503, printable(str(error)), "index-away")


async def _validation_problem(_: Request, error: Exception) -> JSONResponse:
    """What is wrong and where; never what was sent, which may be large or no text at all."""
    assert isinstance(error, RequestValidationError)
    faults = [f"{'.'.join(map(str, fault['loc'][1:]))[:60]}: {fault['msg'][:200]}" for fault in error.errors()[:5]]
    return _problem(422, printable("; ".join(faults)))
