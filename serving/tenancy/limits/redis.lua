-- Limits in Redis: each step in one call, atomic over all scopes of a caller. `limits_redis.py` calls it; what it
-- decides is told beside `Store` and `Reason` in `limits.py`, and is the same as in `limits_memory.py`.
--
-- ARGV: step, holder, day, month, amounts (audio_ms, tokens, nanos, free_tokens), charged_s, limit values of each scope
-- KEYS: the name of each scope, with the prefix of all our keys. Redis Cluster would not know the keys made of them:
-- one Redis (or Valkey) keeps them all.
--
--   <scope>:r|t|a         requests, tokens and audio_ms of the last minute: second -> amount
--   <scope>:held          what is held: "<holder> r|a|t|n|f" -> requests, audio_ms, tokens, nanos, free tokens
--   <scope>:d:<day>, <scope>:m:<month>   what was billed: t, n
--   <scope>:free          free tokens used
--   captioner:holder:<holder>            is there as long as that process lives

local WINDOW_S, BURST_S, DAY_S = 61, 2, 86400
local NONE, CONCURRENT, BURST, RPM, TPD, TPM_MONTH, NPD, NPM, FREE, TPM, APM, CONCURRENT_AUDIO, UNSEEDED =
  0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12

local step, holder, day, month = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local audio_ms, tokens, nanos, free_tokens, charged_s =
  tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local now_s = tonumber(redis.call('TIME')[1])
local FIRST, FIELDS = 10, 13
local NO_LIMIT = -1

local function limits_of(index)
  local at = FIRST + (index - 1) * FIELDS
  local value = function(offset) return tonumber(ARGV[at + offset]) end
  local limits = {
    rpm = value(0), burst = value(1), concurrent = value(2), tpm = value(3), apm_ms = value(4),
    concurrent_ms = value(5), tpd = value(6), tpmonth = value(7), npd = value(8), npmonth = value(9),
    free = value(10), only_free = value(11) == 1, has_budget = value(12) == 1,
  }
  limits.holds = limits.concurrent ~= NO_LIMIT or limits.concurrent_ms ~= NO_LIMIT or limits.has_budget
    or limits.free ~= NO_LIMIT
  return limits
end

-- What has no limit is not counted. What was taken in each second of the last minute, and together; older seconds are
-- forgotten.
local function window(key, limit)
  if limit == NO_LIMIT then return {seconds = {}, sum = 0} end
  local all, seconds, sum, old = redis.call('HGETALL', key), {}, 0, {}
  for index = 1, #all, 2 do
    local second, amount = tonumber(all[index]), tonumber(all[index + 1])
    if second > now_s - WINDOW_S then
      seconds[#seconds + 1] = {second, amount}
      sum = sum + amount
    else
      old[#old + 1] = all[index]
    end
  end
  if #old > 0 then redis.call('HDEL', key, unpack(old)) end
  return {seconds = seconds, sum = sum}
end

local function count(key, limit, second, amount)
  if amount ~= 0 and limit ~= NO_LIMIT then
    redis.call('HINCRBY', key, second, string.format('%.0f', amount))
    redis.call('EXPIRE', key, 2 * WINDOW_S)
  end
end

local function room_in_s(taken, amount, limit)
  table.sort(taken.seconds, function(one, two) return one[1] < two[1] end)
  local left = taken.sum
  for _, entry in ipairs(taken.seconds) do
    left = left - entry[2]
    if left + amount <= limit then return entry[1] + WINDOW_S - now_s end
  end
  return WINDOW_S
end

-- what living holders hold in a scope, together; what dead ones held is theirs no more
local function held_in(key, limits)
  local sums, alive, dead = {r = 0, a = 0, t = 0, n = 0, f = 0}, {}, {}
  local all = limits.holds and redis.call('HGETALL', key) or {}
  for index = 1, #all, 2 do
    local who, what = string.match(all[index], '^(%S+) (%a)$')
    if alive[who] == nil then alive[who] = redis.call('EXISTS', 'captioner:holder:' .. who) == 1 end
    if alive[who] then
      sums[what] = sums[what] + tonumber(all[index + 1])
    else
      dead[#dead + 1] = all[index]
    end
  end
  if #dead > 0 then redis.call('HDEL', key, unpack(dead)) end
  return sums
end

local function hold(state, what, amount)
  if amount == 0 or not state.limits.holds then return end
  local key = state.scope .. ':held'
  local field = holder .. ' ' .. what
  if amount < 0 and redis.call('HEXISTS', key, field) == 0 then return end -- taken from us as we seemed dead
  if redis.call('HINCRBY', key, field, string.format('%.0f', amount)) <= 0 then redis.call('HDEL', key, field) end
  redis.call('EXPIRE', key, DAY_S)
end

-- tokens and nanos billed in a period; nil if nobody knows
local function billed(key)
  local sums = redis.call('HMGET', key, 't', 'n')
  if not sums[1] then return nil end
  return {t = tonumber(sums[1]), n = tonumber(sums[2])}
end

local function refuses_spending(scope, limits, held, more_tokens, more_nanos)
  if limits.has_budget then
    local of_day, of_month = billed(scope .. ':d:' .. day), billed(scope .. ':m:' .. month)
    if not (of_day and of_month) then return UNSEEDED end
    local t, n = held.t + more_tokens, held.n + more_nanos
    if limits.tpd ~= NO_LIMIT and of_day.t + t > limits.tpd then return TPD end
    if limits.tpmonth ~= NO_LIMIT and of_month.t + t > limits.tpmonth then return TPM_MONTH end
    if limits.npd ~= NO_LIMIT and of_day.n + n > limits.npd then return NPD end
    if limits.npmonth ~= NO_LIMIT and of_month.n + n > limits.npmonth then return NPM end
  end
  if limits.free ~= NO_LIMIT then
    local used = redis.call('GET', scope .. ':free')
    if not used then return UNSEEDED end
    if limits.only_free and tonumber(used) + held.f >= limits.free then return FREE end
  end
  return NONE
end

local states = {}
for index, scope in ipairs(KEYS) do states[index] = {scope = scope, limits = limits_of(index)} end

local function answer(reason, retry_after_s, free, free_left)
  local told = {reason, retry_after_s, free, free_left or 0, now_s}
  for _, state in ipairs(states) do
    told[#told + 1] = state.requests.sum
    told[#told + 1] = state.tokens.sum
    told[#told + 1] = state.audio.sum
  end
  return told
end

-- the price of what is not free, in whole nanos, rounded up
local function not_free(free)
  if free == 0 then return nanos end
  local product = nanos * (tokens - free)
  local rest = math.fmod(product, tokens)
  return (product - rest) / tokens + (rest > 0 and 1 or 0)
end

-- count what was billed, where anybody knows what was billed before
local function bill(state, free)
  local scope = state.scope
  for _, key in ipairs({scope .. ':d:' .. day, scope .. ':m:' .. month}) do
    if redis.call('EXISTS', key) == 1 then
      redis.call('HINCRBY', key, 't', string.format('%.0f', tokens))
      redis.call('HINCRBY', key, 'n', string.format('%.0f', nanos))
    end
  end
  if state.limits.free ~= NO_LIMIT and redis.call('EXISTS', scope .. ':free') == 1 then
    redis.call('INCRBY', scope .. ':free', string.format('%.0f', free))
  end
end

if step == 'settle' then
  -- here tokens is what was billed and nanos the price of all of them; held_* and free_left stand behind the limits
  local first = FIRST + #KEYS * FIELDS
  local held_tokens, held_nanos, free_left = tonumber(ARGV[first]), tonumber(ARGV[first + 1]), tonumber(ARGV[first + 2])
  local free = 0
  for _, state in ipairs(states) do
    if state.limits.free ~= NO_LIMIT then
      local used = redis.call('GET', state.scope .. ':free')
      if not used then
        free = math.min(free_left, tokens)
      elseif state.limits.only_free then
        free = tokens
      else
        free = math.min(tokens, math.max(0, state.limits.free - tonumber(used)))
      end
    end
  end
  if free > 0 then nanos = not_free(free) end
  for _, state in ipairs(states) do
    local scope, more = state.scope, tokens - held_tokens
    hold(state, 'r', -1)
    hold(state, 'a', -audio_ms)
    hold(state, 't', -held_tokens)
    hold(state, 'n', -held_nanos)
    if more > 0 then
      count(scope .. ':t', state.limits.tpm, now_s, more)
    elseif charged_s > now_s - WINDOW_S and redis.call('HEXISTS', scope .. ':t', charged_s) == 1 then
      count(scope .. ':t', state.limits.tpm, charged_s, more)
    end
    if state.limits.free ~= NO_LIMIT then hold(state, 'f', -free_tokens) end
    bill(state, free)
  end
  return {NONE, 0, free}
end

if step == 'adopt' then -- held by this process before Redis was lost
  for _, state in ipairs(states) do
    hold(state, 'r', 1)
    hold(state, 'a', audio_ms)
    hold(state, 't', tokens)
    hold(state, 'n', nanos)
    if state.limits.free ~= NO_LIMIT then hold(state, 'f', free_tokens) end
  end
  return {NONE}
end

if step == 'bill' then -- billed by this process while Redis was lost
  for _, state in ipairs(states) do bill(state, free_tokens) end
  return {NONE}
end

if redis.call('EXISTS', 'captioner:holder:' .. holder) == 0 then
  return redis.error_reply('HOLDERLOST this process has been taken for dead')
end

for _, state in ipairs(states) do
  local scope, limits = state.scope, state.limits
  state.requests = window(scope .. ':r', limits.rpm)
  state.tokens = window(scope .. ':t', limits.tpm)
  state.audio = window(scope .. ':a', limits.apm_ms)
  state.held = held_in(scope .. ':held', limits)
end

if step == 'admit' then
  for _, state in ipairs(states) do
    local limits, requests = state.limits, state.requests
    if limits.concurrent ~= NO_LIMIT and state.held.r >= limits.concurrent then return answer(CONCURRENT, 1, 0) end
    if limits.rpm ~= NO_LIMIT then
      if requests.sum + 1 > limits.rpm then return answer(RPM, room_in_s(requests, 1, limits.rpm), 0) end
      local lately = 0
      for _, entry in ipairs(requests.seconds) do
        if entry[1] > now_s - BURST_S then lately = lately + entry[2] end
      end
      if lately + 1 > limits.burst then return answer(BURST, BURST_S, 0) end
    end
    local reason = refuses_spending(state.scope, limits, state.held, 1, 0)
    if reason ~= NONE then return answer(reason, 0, 0) end
  end
  for _, state in ipairs(states) do
    count(state.scope .. ':r', state.limits.rpm, now_s, 1)
    hold(state, 'r', 1)
    state.requests.sum = state.requests.sum + 1
  end
  return answer(NONE, 0, 0)
end

-- charge
local grant, free_left = 0, 0
for _, state in ipairs(states) do
  local used = state.limits.free ~= NO_LIMIT and redis.call('GET', state.scope .. ':free')
  if used then
    free_left = math.max(0, state.limits.free - tonumber(used))
    local left = math.max(0, free_left - state.held.f)
    grant = (left > 0 and state.limits.only_free) and tokens or math.min(left, tokens)
  end
end
nanos = not_free(grant)
for _, state in ipairs(states) do
  local limits = state.limits
  if limits.tpm ~= NO_LIMIT and state.tokens.sum + tokens > limits.tpm then
    return answer(TPM, room_in_s(state.tokens, tokens, limits.tpm), 0)
  end
  if limits.apm_ms ~= NO_LIMIT and state.audio.sum + audio_ms > limits.apm_ms then
    return answer(APM, room_in_s(state.audio, audio_ms, limits.apm_ms), 0)
  end
  if limits.concurrent_ms ~= NO_LIMIT and state.held.a + audio_ms > limits.concurrent_ms then
    return answer(CONCURRENT_AUDIO, 1, 0)
  end
  local reason = refuses_spending(state.scope, limits, state.held, tokens, nanos)
  if reason ~= NONE then return answer(reason, 0, 0) end
end
for _, state in ipairs(states) do
  local scope = state.scope
  count(scope .. ':t', state.limits.tpm, now_s, tokens)
  count(scope .. ':a', state.limits.apm_ms, now_s, audio_ms)
  hold(state, 'a', audio_ms)
  hold(state, 't', tokens)
  hold(state, 'n', nanos)
  if state.limits.free ~= NO_LIMIT then hold(state, 'f', grant) end
  state.tokens.sum = state.tokens.sum + tokens
  state.audio.sum = state.audio.sum + audio_ms
end
return answer(NONE, 0, grant, free_left)
