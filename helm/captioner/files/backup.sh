#!/usr/bin/env bash
# Dump and restore the ledger, with the programs of PostgreSQL's image. The task is in deploy/runbook.md.
#   backup.sh dump       write a dump into $BACKUP_DIR, read it back, and remove all but the newest $BACKUP_KEEP
#   backup.sh restore    replace the ledger by $BACKUP_FILE of $BACKUP_DIR (empty: the newest), or change nothing
# The database is the service's: $CAPTIONER_DATABASE_URL.
set -euo pipefail
umask 077
url=${CAPTIONER_DATABASE_URL/+psycopg/} # which only the service understands
cd "$BACKUP_DIR"

dump() {
  local name old
  name=captioner-$(date -u +%Y-%m-%dT%H%M%SZ).dump
  rm -f .partial-* # of a run that was interrupted
  pg_dump --dbname="$url" --format=custom --file=".partial-$name"
  # Reads and unpacks everything. A database without the ledger's table must not push out the backups of one that has it.
  pg_restore --file=/dev/null ".partial-$name"
  if ! grep -q 'TABLE DATA [^ ]* usage_records' <<<"$(pg_restore --list ".partial-$name")"; then
    echo "the database has no table usage_records; older backups are kept" >&2
    exit 1
  fi
  sync ".partial-$name"
  mv ".partial-$name" "$name"
  for old in $(printf '%s\n' captioner-*.dump | sort -r | tail -n "+$((BACKUP_KEEP + 1))"); do
    rm "$old"
    echo "removed $old"
  done
  echo "wrote $name: $(wc -c <"$name") bytes; kept:"
  printf '%s\n' captioner-*.dump
}

restore() {
  local file others
  file=${BACKUP_FILE:-$(printf '%s\n' captioner-*.dump | sort | tail -n 1)}
  if [ ! -f "$file" ]; then
    echo "no backup $file in $BACKUP_DIR: $(echo captioner-*.dump)" >&2
    exit 1
  fi
  others=$(psql --dbname="$url" --no-psqlrc --tuples-only --no-align --command="SELECT count(*) FROM pg_stat_activity \
    WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()")
  if [ "$others" != 0 ]; then
    echo "$others clients use the database; stop the service first" >&2
    exit 1
  fi
  # One transaction, which is committed only if the whole file was read: otherwise the database stays as it was.
  {
    echo 'BEGIN; DROP SCHEMA IF EXISTS public CASCADE; CREATE SCHEMA public;'
    pg_restore --no-owner --no-privileges --file=- "$file"
    echo 'COMMIT;'
  } | psql --dbname="$url" --no-psqlrc --quiet --set=ON_ERROR_STOP=1 --output=/dev/null
  echo "restored $file"
}

case ${1:-} in
dump | restore) "$1" ;;
*) sed -n '2,5p' "$0" >&2 && exit 2 ;;
esac
