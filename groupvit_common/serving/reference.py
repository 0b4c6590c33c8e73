"""The page about the API, made of its OpenAPI document: plain HTML, without scripts or anything from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_STYLE = """\
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
code, pre { font: 0.9em/1.4 ui-monospace, monospace; }
pre { overflow-x: auto; padding: 0.75rem; border: 1px solid #8886; border-radius: 0.4rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 0.25rem 0.5rem; border-bottom: 1px solid #8886; }
h2 { margin-top: 2.5rem; }
.method { border: 1px solid; border-radius: 0.3rem; padding: 0 0.4rem; font-size: 0.8em; }
.scroll { overflow-x: auto; }
"""


def reference_style() -> str:
    """Returns the style sheet of the page."""
    return _STYLE


def reference_page(document: Mapping[str, Any]) -> str:
    """Returns the page about an OpenAPI document."""
    parts = document["components"]["schemas"]
    lines = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="page/favicon.svg" type="image/svg+xml"><title>groupvit API</title>',
        '<link rel="stylesheet" href="docs.css"></head><body><main>',
        f"<h1>groupvit API</h1><p>{escape(document['info'].get('description', ''))} "
        "Requests are JSON or forms (multipart/form-data) with the same fields; errors are "
        '<code>{"error": {"code", "message"}}</code>. The machine-readable document is '
        '<a href="openapi.json">openapi.json</a>; the <a href="./">page</a> uses nothing else.</p>',
        "<pre>curl -F image=@photo.jpg -F 'labels=cat, dog|puppy, grass' http://127.0.0.1:8000/v1/segment</pre>",
    ]
    for path, methods in document["paths"].items():
        for method, about in methods.items():
            lines.append(f'<h2><span class="method">{method.upper()}</span> <code>{escape(path)}</code></h2>')
            lines.append(f"<p>{escape(about.get('summary', ''))}.</p>")
            body = about.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            if body is not None:
                lines += _table("Request", body, parts)
            answer = about["responses"].get("200", {}).get("content", {}).get("application/json", {}).get("schema", {})
            if "$ref" in answer:
                lines += _table("Answer", answer, parts)
    return "".join((*lines, "</main></body></html>"))


def _table(title: str, schema: Mapping[str, Any], parts: Mapping[str, Any]) -> Iterator[str]:
    model = parts[schema["$ref"].rpartition("/")[2]]
    yield f'<h3>{title}</h3><div class="scroll"><table><tr><th>Field</th><th>Type</th><th>Meaning</th></tr>'
    for name, about in model.get("properties", {}).items():
        needed = " (needed)" if name in model.get("required", ()) and title == "Request" else ""
        yield (
            f"<tr><td><code>{escape(name)}</code></td><td>{escape(_kind(about, parts))}{needed}</td>"
            f"<td>{escape(about.get('description', ''))}</td></tr>"
        )
    yield "</table></div>"


def _kind(about: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    """Returns the type of a field in words."""
    if "$ref" in about:
        name = about["$ref"].rpartition("/")[2]
        fields = parts[name].get("properties", {})
        return "{" + ", ".join(fields) + "}" if fields else name
    if "anyOf" in about:
        return " or ".join(dict.fromkeys(_kind(each, parts) for each in about["anyOf"]))
    if "enum" in about:
        return " | ".join(map(str, about["enum"]))
    if "const" in about:
        return str(about["const"])
    if about.get("type") == "array":
        return f"list of {_kind(about.get('items', {}), parts)}"
    if about.get("format") == "binary":
        return "image file"
    return str(about.get("type", "any"))
