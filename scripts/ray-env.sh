#!/bin/sh
# Makes $VENV/ray: what $VENV has, and Ray on top, which brings packages that nothing else here needs.
set -eu
: "${VENV:=.venv}"
"$VENV/bin/python" -m venv "$VENV/ray"
"$VENV/bin/python" - "$VENV/ray" <<'PY'
import pathlib, sys, sysconfig
(site,) = pathlib.Path(sys.argv[1]).glob("lib/python3*/site-packages")
(site / "base.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
PY
wanted=$("$VENV/bin/python" -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['ray'])")
# shellcheck disable=SC2086
"$VENV/ray/bin/python" -m pip --disable-pip-version-check -q install $wanted
