"""What `workbench ui` starts: a Streamlit server of the explorer, bound to one address, with its two themes."""

from __future__ import annotations

import sys
from pathlib import Path

LIGHT = {"primaryColor": "#0B63A5", "backgroundColor": "#FFFFFF", "secondaryBackgroundColor": "#F3F5F8",
         "textColor": "#1B1F24"}  # fmt: skip
DARK = {"primaryColor": "#5FB0F0", "backgroundColor": "#11151C", "secondaryBackgroundColor": "#1B212B",
        "textColor": "#E8E8E8"}  # fmt: skip


def command(address: str, port: int) -> list[str]:
    """The command line of the server."""
    flags = {
        "server.address": address, "server.port": port, "server.headless": "true", "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false", "client.toolbarMode": "viewer", "client.showErrorDetails": "type",
        "client.showErrorLinks": "false",  # no search engine is asked about an error here
        "server.maxUploadSize": 1, "server.enableStaticServing": "false", "runner.fastReruns": "true",
        "runner.postScriptGC": "false",  # a whole collection takes a quarter of a second with torch loaded, after every click
        "global.disableWidgetStateDuplicationWarning": "true",  # a click in a figure sets the pick of a widget
        **{f"theme.light.{key}": value for key, value in LIGHT.items()},
        **{f"theme.dark.{key}": value for key, value in DARK.items()},
    }  # fmt: skip
    script = Path(__file__).parent / "entry" / "explorer.py"
    return [
        sys.executable,
        "-m",
        "streamlit",
        "run",
        str(script),
        *(f"--{key}={value}" for key, value in flags.items()),
    ]
