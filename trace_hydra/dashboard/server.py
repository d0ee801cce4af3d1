"""The three calls to a W&B server that put a page into a project: find the project, find the page, write it."""

import json
import re
import time
from collections.abc import Mapping
from typing import Any

from trace_hydra.errors import DashboardError
from trace_hydra.wandb_quiet import contained

_PROJECT = """query Project($entity: String!, $project: String!) {
  project(name: $project, entityName: $entity) { id internalId }
}"""
_VIEWS = """query Views($entity: String!, $project: String!, $type: String!, $name: String!) {
  project(name: $project, entityName: $entity) {
    allViews(viewType: $type, viewName: $name) { edges { node { id name } } }
  }
}"""
_UPSERT = """mutation UpsertView($id: ID, $entity: String!, $project: String!, $type: String!, $name: String!,
    $title: String!, $description: String!, $spec: String!) {
  upsertView(input: {id: $id, entityName: $entity, projectName: $project, type: $type, name: $name,
      displayName: $title, description: $description, spec: $spec, createdUsing: WANDB_SDK}) {
    view { id name }
  }
}"""
_TYPES = {"workspace": "project-view", "report": "runs"}
_ADVICE = {
    401: "The API key is not valid there; run `wandb login --relogin`, or set WANDB_API_KEY.",
    403: "The account may not do this; check --entity and --project, and your role there.",
    404: "There is no such thing there; check WANDB_BASE_URL, --entity and --project.",
    429: "These are too many requests; try again in some minutes.",
}
_LATE = "did not respond in time"
_BROKEN = ("unexpected EOF", "invalid character", "unexpected end of JSON")
"""Go's words for half an answer, and for HTML."""
_LONGEST = 300  # characters of a server's own words


class Server:
    """A W&B server with an account on it.

    Args:
        timeout_s: Seconds that each of its answers may take.

    Raises:
        DashboardError: If no key is configured, W&B is switched off, or what is configured cannot be used.
    """

    def __init__(self, timeout_s: float):
        import wandb
        from wandb.apis.public.service_api import ServiceApi
        from wandb.sdk.lib import wbauth

        self.timeout_s, self._key, self.url = timeout_s, "", "W&B"
        try:
            with contained():
                settings = wandb.setup(wandb.Settings(silent=True)).settings.model_copy()
                self.url, mode = settings.base_url, settings.mode
                found = wbauth.authenticate_session(
                    host=self.url, source="trace_hydra", prompt=False, update_session=False
                )
                if found:
                    wbauth.settings.set_auth_settings(settings, found)
        except Exception as error:  # noqa: BLE001 - wandb raises errors of all kinds for what is configured wrongly
            raise DashboardError(f"W&B is not configured: {self._words(error)}") from None
        self._key = settings.api_key or ""
        if mode not in ("online", "run", "shared"):
            raise DashboardError(f"WANDB_MODE or wandb's settings say {mode}. Set it to online, or add --offline.")
        if not found and not self._key:
            raise DashboardError(
                f"no API key is configured for {self.url}. Run `wandb login`, set WANDB_API_KEY, or add --offline."
            )
        settings.x_graphql_retry_max = 1  # 0 stands for wandb's own value, 20
        settings.x_graphql_timeout_seconds = timeout_s
        self.app_url = settings.app_url.rstrip("/")
        self._service = ServiceApi(settings, timeout=timeout_s)

    def save(self, entity: str, project: str, pages: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """Write pages, those of an earlier call anew; returns page -> its address.

        Args:
            entity: User or team.
            project: One that exists.
            pages: "workspace" and "report", as `pages.build` makes them.

        Raises:
            DashboardError: If the server does not take one; those before it are written then.
        """
        place = {"entity": entity, "project": project}
        found = self._ask("the project", _PROJECT, place)
        if (known := found.get("project")) is None:
            raise DashboardError(
                f"{self.url} has no project {entity}/{project}, or this account may not see it. Check --entity and "
                "--project; a project begins with its first run."
            )
        internal = _text(known, "internalId", "id")
        if internal is None:
            raise self._half("the project")
        return {kind: self._save(kind, page, place, internal) for kind, page in pages.items() if kind in _TYPES}

    def _save(self, kind: str, page: Mapping[str, Any], place: Mapping[str, str], project_id: str) -> str:
        name = {**place, "type": _TYPES[kind], "name": page["name"]}
        found = self._ask(f"the {kind}", _VIEWS, name)
        try:
            edges = found["project"]["allViews"]["edges"]
            before = edges[0]["node"]["id"] if edges else None
        except (KeyError, TypeError, IndexError):
            raise self._half(f"the {kind}") from None
        spec = _with_project(page["spec"], {"id": project_id, "name": place["project"], "entityName": place["entity"]})
        written = self._ask(
            f"writing the {kind}",
            _UPSERT,
            {
                **name,
                "title": page["title"],
                "description": page["description"],
                "spec": json.dumps(spec, ensure_ascii=False),
                **({"id": before} if before else {}),
            },
        )
        try:
            view = _text(written["upsertView"]["view"], "id")
        except (KeyError, TypeError):
            view = None
        if view is None:
            raise self._half(f"writing the {kind}")
        home = f"{self.app_url}/{place['entity']}/{place['project']}"
        if kind == "workspace":
            return f"{home}?nw={page['name'].removeprefix('nw-').removesuffix('-v')}"
        return f"{home}/reports/{re.sub(r'[^A-Za-z0-9]+', '-', page['title'])}--{view.rstrip('=')}"

    def _ask(self, what: str, query: str, variables: Mapping[str, Any]) -> Mapping[str, Any]:
        from wandb.sdk.lib.service.service_connection import WandbApiFailedError

        started = time.monotonic()
        try:
            with contained():
                answer = self._service.execute_graphql(query, variables)
        except WandbApiFailedError as error:
            raise DashboardError(self._failure(what, error, time.monotonic() - started)) from None
        except Exception as error:  # noqa: BLE001 - half an answer, or wandb's own service is gone
            raise DashboardError(f"{what}: {self.url} gave no usable answer: {self._words(error)}") from None
        if not isinstance(answer, Mapping):
            raise self._half(what)
        return answer

    def _failure(self, what: str, error: Any, seconds: float) -> str:
        """Say what went wrong in the terms of the command line; wandb retries what may pass, within the limit."""
        words = self._words(error)
        found = re.search(r"\bHTTP ([45]\d\d)\b", words)
        code = int(found[1]) if found else getattr(error.response, "http_status", 0)
        if code:
            after = _ADVICE.get(code, "The server is at fault; try again later." if code >= 500 else "It refuses this.")
            return f"{what}: {self.url} answered {code}. {after} Its words: {words}"
        if _LATE in words or seconds >= self.timeout_s:
            return (
                f"{what}: {self.url} did not answer within {self.timeout_s:g} s, or asked to wait because of too many "
                "requests. Try again later, or raise --timeout."
            )
        if any(one in words for one in _BROKEN):
            return str(self._half(what))
        return f"{what}: {self.url}: {words}"

    def _half(self, what: str) -> DashboardError:
        return DashboardError(
            f"{what}: {self.url} gave half an answer, or one that is not W&B's. Look at WANDB_BASE_URL."
        )

    def _words(self, error: BaseException) -> str:
        """Take an error's text without the key, on one line, without control characters."""
        text = " ".join(str(error).split()) or type(error).__name__
        if self._key:
            text = text.replace(self._key, "(key)")
        return "".join(one if one.isprintable() else "�" for one in text)[:_LONGEST]


def _text(node: Any, *keys: str) -> str | None:
    """Give the first of some keys that holds something."""
    found = next((node[key] for key in keys if node.get(key)), None) if isinstance(node, Mapping) else None
    return None if found is None else str(found)


def _with_project(node: Any, project: Mapping[str, str]) -> Any:
    """Say in every set of runs which project they are of; the stored page does not name one."""
    if isinstance(node, Mapping):
        changed = {key: _with_project(value, project) for key, value in node.items()}
        for one in changed.get("runSets", []):
            one["project"] = dict(project)
        return changed
    return [_with_project(one, project) for one in node] if isinstance(node, list) else node
