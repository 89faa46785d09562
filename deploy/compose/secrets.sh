#!/usr/bin/env bash
# Create missing secrets with random values and keep existing ones: ./secrets.sh [DIRECTORY]
set -euo pipefail
umask 077
directory=${1:-$(dirname "$0")/secrets}
mkdir -p "$directory"
cd "$directory"

random() { head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n'; }

# Only the owner can enter the directory. The files are readable by all, because containers mount them under other users.
secret() { # secret NAME VALUE
  if [ -e "$1" ]; then
    echo "kept $1"
  else
    printf '%s\n' "$2" > ".$1.new"
    chmod 0444 ".$1.new"
    mv ".$1.new" "$1"
    echo "created $1"
  fi
}

secret postgres_password "$(random)"
secret redis_conf "requirepass $(random)
save \"\"
appendonly no
maxmemory 384mb
maxmemory-policy noeviction"
secret grafana_password "$(random)"
secret captioner_key_pepper "$(random)"
secret captioner_upload_secret "$(random)"
secret captioner_metrics_token "$(random)"
secret captioner_database_url "postgresql+psycopg://captioner:$(<postgres_password)@postgres:5432/captioner"
secret captioner_redis_url "redis://:$(sed -n 's/^requirepass //p' redis_conf)@redis:6379/0"
