"""Checks a dashboard's JSON against the types that Grafana publishes for it: `@grafana/schema`.

Grafana itself is in no registry that the tests install from. Its own front end is compiled with
these types; TypeScript compares each panel with those of its kind.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

from support.client_environments import node_folder

# Values of enums may be written as their texts. What is left out has a default.
PREAMBLE = """
import type { Dashboard, DataQuery, FieldConfig, Panel, RowPanel } from "@grafana/schema";
import type * as timeseries from "@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";
import type * as stat from "@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";

type Written<T> = T extends string ? `${T}`
  : T extends number | boolean | null | undefined ? T
  : T extends (infer One)[] ? Written<One>[]
  : T extends object ? { [Name in keyof T]?: Written<T[Name]> }
  : T;
type Target = DataQuery & { expr: string; legendFormat: string; format?: "heatmap" | "table" };
type Of<Kind, Options, Custom> = Written<Omit<Panel, "type" | "options" | "fieldConfig" | "targets">>
  & { type: Kind; options: Written<Options>; targets: Target[] }
  & { fieldConfig: { defaults: Written<Omit<FieldConfig, "custom"> & { custom: Custom }>; overrides: [] } };
type Panels = {
  timeseries: Of<"timeseries", timeseries.Options, timeseries.FieldConfig>;
  stat: Of<"stat", stat.Options, never>;
  row: Written<RowPanel>;
};
"""  # noqa: E501
OPTIONS = ("--noEmit", "--strict", "--skipLibCheck", "--target", "es2022", "--pretty", "false")
MODULES = ("--module", "esnext", "--moduleResolution", "bundler")


def type_errors(dashboard: dict[str, Any]) -> list[str]:
    """What TypeScript finds: each a line with the place in the file, and what does not match."""
    node, packages = node_folder()
    folder = packages / "dashboards"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "dashboard.ts").write_text(PREAMBLE + _as_typescript(dashboard), "utf-8")
    tsc = packages / "node_modules" / "typescript" / "bin" / "tsc"
    command = [node, tsc, *OPTIONS, *MODULES, folder / "dashboard.ts"]
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, capture_output=True, text=True, timeout=600
    )
    errors = done.stdout.splitlines()
    assert done.returncode == 0 or errors, done.stderr
    return errors


def _as_typescript(dashboard: dict[str, Any]) -> str:
    """A constant for each panel, with the type of its kind, and one for the rest."""
    rest = {name: value for name, value in dashboard.items() if name != "panels"}
    lines = [f"export const dashboard: Written<Dashboard> = {json.dumps(rest, indent=1)};"]
    for panel in dashboard["panels"]:
        text = json.dumps(panel, indent=1)
        lines.append(f'export const panel{panel["id"]}: Panels["{panel["type"]}"] = {text};')
    return "\n".join(lines)
