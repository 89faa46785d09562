#!/bin/sh
# Copy the ledger's dumps to and from an object store, in rclone's image.
#   backup-objects.sh upload    copy the dumps of $BACKUP_DIR to $BACKUP_REMOTE; remove all but the newest $BACKUP_KEEP there
#   backup-objects.sh fetch     copy $BACKUP_FILE (empty: the newest) of $BACKUP_REMOTE into $BACKUP_DIR
set -eu

stored() { rclone --config= lsf --files-only --include 'captioner-*.dump' "$BACKUP_REMOTE"; }

case ${1:-} in
upload)
  # Compares sums. An object that is already there is never written again.
  rclone --config= copy --immutable --include 'captioner-*.dump' "$BACKUP_DIR" "$BACKUP_REMOTE"
  names=$(stored)
  for old in $(printf '%s\n' "$names" | sort -r | tail -n "+$((BACKUP_KEEP + 1))"); do
    rclone --config= deletefile "$BACKUP_REMOTE/$old"
    echo "removed $old"
  done
  printf 'stored in %s:\n%s\n' "$BACKUP_REMOTE" "$(stored)"
  ;;
fetch)
  names=$(stored)
  file=${BACKUP_FILE:-$(printf '%s\n' "$names" | sort | tail -n 1)}
  if [ -z "$file" ]; then
    echo "no backup in $BACKUP_REMOTE" >&2
    exit 1
  fi
  rclone --config= copyto "$BACKUP_REMOTE/$file" "$BACKUP_DIR/$file"
  ;;
*) sed -n '2,4p' "$0" >&2 && exit 2 ;;
esac
