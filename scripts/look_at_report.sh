#!/usr/bin/env bash
# Looks at a report page in a real browser: light and dark, wide and narrow.
#
#   scripts/look_at_report.sh PAGE.html OUTDIR
#
# Writes OUTDIR/PAGE-{light,dark}-{1280,700}.png, each the whole page. Fails if the page logs an
# error or a warning, asks for anything from the network, or shows nothing. Needs Chromium (Debian:
# apt-get install chromium), found through CHROMIUM or PATH.
set -euo pipefail

if [ $# -ne 2 ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
if [ ! -f "$1" ]; then
  echo "$1: no such file" >&2
  exit 2
fi
page=$(realpath "$1")
mkdir -p "$2"
out=$(realpath "$2")

chromium=${CHROMIUM:-}
for name in chromium chromium-browser google-chrome; do
  chromium=${chromium:-$(command -v "$name" || true)}
done
if ! command -v "${chromium:-none}" >/dev/null; then
  echo "no Chromium: install it, or name it in CHROMIUM" >&2
  exit 2
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# look URL WIDTH HEIGHT SCHEME MORE…: runs the browser with no way out; what the page says goes to
# $work/log. The schemes are Blink's numbers: 0 dark, 1 light.
look() {
  local url=$1 width=$2 height=$3 scheme=$4
  shift 4
  timeout 120 "$chromium" --headless=new --no-sandbox --disable-gpu --no-first-run \
    --user-data-dir="$work/profile" --hide-scrollbars --force-device-scale-factor=1 \
    --host-resolver-rules='MAP * ~NOTFOUND' --disable-background-networking \
    --disable-component-update --disable-extensions --disable-sync \
    --blink-settings=preferredColorScheme="$scheme" --window-size="$width,$height" \
    --virtual-time-budget=3000 --enable-logging=stderr --log-level=0 \
    "$@" "$url" 2>"$work/log"
}

# How high the page is at a width: a frame around it can ask, the page itself says nothing.
height() {
  local width=$1 found
  {
    echo '<!doctype html><style>body{margin:0}iframe{border:0;width:100%;height:900px}</style>'
    echo '<script>function tell(frame) { document.title = "height="'
    echo '  + frame.contentDocument.documentElement.scrollHeight; }</script>'
    echo "<iframe onload=\"tell(this)\" src=\"file://$page\"></iframe>"
  } >"$work/frame.html"
  look "file://$work/frame.html" "$width" 900 1 --allow-file-access-from-files --dump-dom \
    >"$work/dom"
  found=$(grep -o 'height=[0-9]*' "$work/dom" | tail -n 1 | cut -d= -f2)
  echo "${found:-900}"
}

status=0
stem=$(basename "$page" .html)
for width in 1280 700; do
  tall=$(height "$width")
  # What Chromium can hold as one picture.
  if [ "$tall" -gt 15000 ]; then tall=15000; fi
  for scheme in 1 0; do
    name=light
    if [ "$scheme" = 0 ]; then name=dark; fi
    shot=$out/$stem-$name-$width.png
    rm -f "$shot"
    look "file://$page" "$width" "$tall" "$scheme" --screenshot="$shot" \
      --log-net-log="$work/net" >/dev/null
    if grep -E 'CONSOLE|ERR_' "$work/log" >&2; then
      echo "$shot: the page complains" >&2
      status=1
    fi
    # What the browser asks for by itself comes from no origin.
    if grep -o '"initiator":"[^"]*"' "$work/net" | grep -qv 'not an origin'; then
      echo "$shot: the page asks the network:" >&2
      grep -o '"url":"[^"]*"' "$work/net" | sort -u >&2
      status=1
    fi
    look 'data:text/html,<meta name="color-scheme" content="light dark">' \
      "$width" "$tall" "$scheme" --screenshot="$work/blank.png" >/dev/null
    blank=$(stat -c %s "$work/blank.png")
    size=$(stat -c %s "$shot" 2>/dev/null || echo 0)
    if [ "$size" -lt $((blank + 4000)) ]; then
      echo "$shot: nothing is seen ($size bytes; an empty page has $blank)" >&2
      status=1
    fi
    echo "$shot: $width × $tall, $size bytes"
  done
done
exit "$status"
