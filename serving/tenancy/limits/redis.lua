-- Limits in Redis: one call for each step, atomic over all scopes of a caller. `redis.py` calls it. The steps and their
-- answers are documented at `CounterStore`, in counter_store.py; `memory.py` implements the same algorithm.
--
-- KEYS: the name of each scope, with the prefix of all our keys. ARGV: see TEXTS, NUMBERS, and LIMITS for each scope.
-- One Redis (or Valkey) keeps all keys: Redis Cluster would not know those that the script derives from KEYS.
--
--   <scope>:r|t|a         requests, tokens and audio_ms of the last minute: second -> amount
--   <scope>:held          reserved: "<holder> r|a|t|n|f" -> requests, audio_ms, tokens, nanos, free tokens
--   <scope>:d:<day>, <scope>:m:<month>   billed: t, n (tokens, nanos)
--   <scope>:free          free tokens used
--   captioner:holder:<holder>            exists as long as that process is alive

--@constants: redis_script.py puts WINDOW_S, BURST_S, UNSET, Reason, TEXTS, NUMBERS, LIMITS and REPLY here.

local DAY_S = 86400
local now_s = tonumber(redis.call('TIME')[1])

local given, at = {}, 0
for _, name in ipairs(TEXTS) do
  at = at + 1
  given[name] = ARGV[at]
end
for _, name in ipairs(NUMBERS) do
  at = at + 1
  given[name] = tonumber(ARGV[at])
end
local states = {}
for index, scope in ipairs(KEYS) do
  local limits = {}
  for _, name in ipairs(LIMITS) do
    at = at + 1
    local value = tonumber(ARGV[at])
    if value ~= UNSET then limits[name] = value end
  end
  limits.audio_ms_per_minute = limits.audio_seconds_per_minute and 1000 * limits.audio_seconds_per_minute
  limits.concurrent_audio_ms = limits.concurrent_audio_seconds and 1000 * limits.concurrent_audio_seconds
  limits.needs_reserved = limits.concurrent_requests or limits.concurrent_audio_ms or limits.has_budget
    or limits.free_tokens
  states[index] = {scope = scope, limits = limits}
end
local day_key, month_key = ':d:' .. given.day, ':m:' .. given.month

local function reply(values)
  local fields = {}
  for index, name in ipairs(REPLY) do fields[index] = values[name] or 0 end
  return fields
end

-- The seconds of the last minute in which anything was counted, and the sum; older seconds are removed. What has no
-- limit is not counted.
local function window(key, limit)
  if not limit then return {seconds = {}, sum = 0} end
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
  if limit and amount ~= 0 then
    redis.call('HINCRBY', key, second, string.format('%.0f', amount))
    redis.call('EXPIRE', key, 2 * WINDOW_S)
  end
end

-- Seconds until the amount fits below the limit.
local function retry_after_s(counted, amount, limit)
  table.sort(counted.seconds, function(one, two) return one[1] < two[1] end)
  local left = counted.sum
  for _, entry in ipairs(counted.seconds) do
    left = left - entry[2]
    if left + amount <= limit then return entry[1] + WINDOW_S - now_s end
  end
  return WINDOW_S
end

-- Sums of what living processes have reserved in a scope; reservations of dead ones are removed.
local function reserved_in(key, limits)
  local sums, alive, dead = {r = 0, a = 0, t = 0, n = 0, f = 0}, {}, {}
  local all = limits.needs_reserved and redis.call('HGETALL', key) or {}
  for index = 1, #all, 2 do
    local holder, kind = string.match(all[index], '^(%S+) (%a)$')
    if alive[holder] == nil then alive[holder] = redis.call('EXISTS', 'captioner:holder:' .. holder) == 1 end
    if alive[holder] then
      sums[kind] = sums[kind] + tonumber(all[index + 1])
    else
      dead[#dead + 1] = all[index]
    end
  end
  if #dead > 0 then redis.call('HDEL', key, unpack(dead)) end
  return sums
end

local function reserve(state, kind, amount)
  if amount == 0 or not state.limits.needs_reserved then return end
  local key, field = state.scope .. ':held', given.holder .. ' ' .. kind
  if amount < 0 and redis.call('HEXISTS', key, field) == 0 then return end -- removed: this process seemed dead
  if redis.call('HINCRBY', key, field, string.format('%.0f', amount)) <= 0 then redis.call('HDEL', key, field) end
  redis.call('EXPIRE', key, DAY_S)
end

local function reserve_amounts(state, sign, tokens, nanos, free_tokens)
  reserve(state, 'a', sign * given.audio_ms)
  reserve(state, 't', sign * tokens)
  reserve(state, 'n', sign * nanos)
  if state.limits.free_tokens then reserve(state, 'f', sign * free_tokens) end
end

-- Tokens and nanos billed in a period; nil if unknown.
local function billed(key)
  local sums = redis.call('HMGET', key, 't', 'n')
  if not sums[1] then return nil end
  return {t = tonumber(sums[1]), n = tonumber(sums[2])}
end

-- The reason to refuse more tokens and nanos, if there is one.
local function spending_refusal(state, tokens, nanos)
  local scope, limits, reserved = state.scope, state.limits, state.reserved
  if limits.has_budget then
    local of_day, of_month = billed(scope .. day_key), billed(scope .. month_key)
    if not (of_day and of_month) then return Reason.UNSEEDED end
    local t, n = reserved.t + tokens, reserved.n + nanos
    if limits.tokens_per_day and of_day.t + t > limits.tokens_per_day then return Reason.TOKENS_PER_DAY end
    if limits.tokens_per_month and of_month.t + t > limits.tokens_per_month then return Reason.TOKENS_PER_MONTH end
    if limits.nanos_per_day and of_day.n + n > limits.nanos_per_day then return Reason.NANOS_PER_DAY end
    if limits.nanos_per_month and of_month.n + n > limits.nanos_per_month then return Reason.NANOS_PER_MONTH end
  end
  if limits.free_tokens then
    local used = redis.call('GET', scope .. ':free')
    if not used then return Reason.UNSEEDED end
    if limits.only_free and tonumber(used) + reserved.f >= limits.free_tokens then return Reason.FREE_TIER end
  end
end

-- The price of the tokens that are not free, in whole nanos, rounded up.
local function nanos_to_pay(free_tokens)
  if free_tokens == 0 then return given.nanos end
  local product = given.nanos * (given.tokens - free_tokens)
  local rest = math.fmod(product, given.tokens)
  return (product - rest) / given.tokens + (rest > 0 and 1 or 0)
end

-- Count what was billed, where it is known what was billed before.
local function bill(state, nanos, free_tokens)
  local scope = state.scope
  for _, key in ipairs({scope .. day_key, scope .. month_key}) do
    if redis.call('EXISTS', key) == 1 then
      redis.call('HINCRBY', key, 't', string.format('%.0f', given.tokens))
      redis.call('HINCRBY', key, 'n', string.format('%.0f', nanos))
    end
  end
  if state.limits.free_tokens and redis.call('EXISTS', scope .. ':free') == 1 then
    redis.call('INCRBY', scope .. ':free', string.format('%.0f', free_tokens))
  end
end

if given.step == 'settle' then -- tokens: billed; nanos: the price of all of them
  local free_tokens = 0
  for _, state in ipairs(states) do
    if state.limits.free_tokens then
      local used = redis.call('GET', state.scope .. ':free')
      if not used then
        free_tokens = math.min(given.free_left, given.tokens)
      elseif state.limits.only_free then
        free_tokens = given.tokens
      else
        free_tokens = math.min(given.tokens, math.max(0, state.limits.free_tokens - tonumber(used)))
      end
    end
  end
  local nanos, more = nanos_to_pay(free_tokens), given.tokens - given.reserved_tokens
  for _, state in ipairs(states) do
    local key, limit = state.scope .. ':t', state.limits.tokens_per_minute
    reserve(state, 'r', -1)
    reserve_amounts(state, -1, given.reserved_tokens, given.reserved_nanos, given.free_tokens)
    if more > 0 then
      count(key, limit, now_s, more)
    elseif given.charged_s > now_s - WINDOW_S and redis.call('HEXISTS', key, given.charged_s) == 1 then
      count(key, limit, given.charged_s, more)
    end
    bill(state, nanos, free_tokens)
  end
  return reply({free_tokens = free_tokens})
end

if given.step == 'adopt' then -- reserved by this process before Redis was lost
  for _, state in ipairs(states) do
    reserve(state, 'r', 1)
    reserve_amounts(state, 1, given.tokens, given.nanos, given.free_tokens)
  end
  return reply({})
end

if given.step == 'bill' then -- billed by this process while Redis was lost
  for _, state in ipairs(states) do bill(state, given.nanos, given.free_tokens) end
  return reply({})
end

if redis.call('EXISTS', 'captioner:holder:' .. given.holder) == 0 then
  return redis.error_reply('HOLDERLOST this process has been taken for dead')
end

for _, state in ipairs(states) do
  local scope, limits = state.scope, state.limits
  state.requests = window(scope .. ':r', limits.requests_per_minute)
  state.tokens = window(scope .. ':t', limits.tokens_per_minute)
  state.audio = window(scope .. ':a', limits.audio_ms_per_minute)
  state.reserved = reserved_in(scope .. ':held', limits)
end

local function answer(values)
  values.now_s = now_s
  local fields = reply(values)
  for _, state in ipairs(states) do
    fields[#fields + 1] = state.requests.sum
    fields[#fields + 1] = state.tokens.sum
    fields[#fields + 1] = state.audio.sum
  end
  return fields
end

local function refuse(reason, seconds) return answer({reason = reason, retry_after_s = seconds}) end

if given.step == 'admit' then
  for _, state in ipairs(states) do
    local limits, requests = state.limits, state.requests
    if limits.concurrent_requests and state.reserved.r >= limits.concurrent_requests then
      return refuse(Reason.CONCURRENT_REQUESTS, 1)
    end
    if limits.requests_per_minute then
      if requests.sum + 1 > limits.requests_per_minute then
        return refuse(Reason.REQUESTS_PER_MINUTE, retry_after_s(requests, 1, limits.requests_per_minute))
      end
      local lately = 0
      for _, entry in ipairs(requests.seconds) do
        if entry[1] > now_s - BURST_S then lately = lately + entry[2] end
      end
      if lately + 1 > limits.burst then return refuse(Reason.BURST, BURST_S) end
    end
    local reason = spending_refusal(state, 1, 0)
    if reason then return refuse(reason, 0) end
  end
  for _, state in ipairs(states) do
    count(state.scope .. ':r', state.limits.requests_per_minute, now_s, 1)
    reserve(state, 'r', 1)
    state.requests.sum = state.requests.sum + 1
  end
  return answer({})
end

-- charge
local grant, free_left = 0, 0
for _, state in ipairs(states) do
  local limits = state.limits
  local used = limits.free_tokens and redis.call('GET', state.scope .. ':free')
  if used then
    free_left = math.max(0, limits.free_tokens - tonumber(used))
    local left = math.max(0, free_left - state.reserved.f)
    grant = (left > 0 and limits.only_free) and given.tokens or math.min(left, given.tokens)
  end
end
local nanos = nanos_to_pay(grant)
for _, state in ipairs(states) do
  local limits, tokens, audio = state.limits, state.tokens, state.audio
  if limits.tokens_per_minute and tokens.sum + given.tokens > limits.tokens_per_minute then
    return refuse(Reason.TOKENS_PER_MINUTE, retry_after_s(tokens, given.tokens, limits.tokens_per_minute))
  end
  if limits.audio_ms_per_minute and audio.sum + given.audio_ms > limits.audio_ms_per_minute then
    return refuse(Reason.AUDIO_SECONDS_PER_MINUTE, retry_after_s(audio, given.audio_ms, limits.audio_ms_per_minute))
  end
  if limits.concurrent_audio_ms and state.reserved.a + given.audio_ms > limits.concurrent_audio_ms then
    return refuse(Reason.CONCURRENT_AUDIO_SECONDS, 1)
  end
  local reason = spending_refusal(state, given.tokens, nanos)
  if reason then return refuse(reason, 0) end
end
for _, state in ipairs(states) do
  count(state.scope .. ':t', state.limits.tokens_per_minute, now_s, given.tokens)
  count(state.scope .. ':a', state.limits.audio_ms_per_minute, now_s, given.audio_ms)
  reserve_amounts(state, 1, given.tokens, nanos, grant)
  state.tokens.sum = state.tokens.sum + given.tokens
  state.audio.sum = state.audio.sum + given.audio_ms
end
return answer({free_tokens = grant, free_left = free_left})
