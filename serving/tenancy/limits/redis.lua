-- Limits in Redis: one call for each step, atomic over all scopes of a caller. `redis.py` calls it. The steps and their
-- answers are documented at `CounterStore`, in counter_store.py; `memory.py` implements the same algorithm.
--
-- KEYS: the name of each scope, with the prefix of all our keys. ARGV: see TEXTS, NUMBERS, and LIMITS for each scope.
-- One Redis (or Valkey) keeps all keys: Redis Cluster would not know those that the script derives from KEYS.
--
--   <scope>:r|t|a         requests, tokens and audio_ms of the last minute: second -> amount
--   <scope>:held          reserved: "<holder> r|a|t|n:<currency>" -> requests, audio_ms, tokens, nanos
--   <scope>:d:<day>, <scope>:m:<month>   billed: t, n:<currency> (tokens, nanos)
--   <scope>:free          free tokens used
--   captioner:holder:<holder>            exists as long as that process is alive

--@constants: redis_script.py puts WINDOW_S, BURST_S, UNSET, those of spending.py, Reason, TEXTS, NUMBERS, LIMITS, REPLY, USE here.

local DAY_S = 86400
local TOKEN_BUDGETS = {{'tokens_per_day', Reason.TOKENS_PER_DAY}, {'tokens_per_month', Reason.TOKENS_PER_MONTH}}
local MONEY_BUDGETS = {{'nanos_per_day', Reason.NANOS_PER_DAY}, {'nanos_per_month', Reason.NANOS_PER_MONTH}}
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
local day_key, month_key, money = ':d:' .. given.day, ':m:' .. given.month, 'n:' .. given.currency

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
  local sums, alive, dead = {r = 0, a = 0, t = 0}, {}, {}
  local all = limits.needs_reserved and redis.call('HGETALL', key) or {}
  for index = 1, #all, 2 do
    local holder, kind = string.match(all[index], '^(%S+) (%S+)$')
    if alive[holder] == nil then alive[holder] = redis.call('EXISTS', 'captioner:holder:' .. holder) == 1 end
    if alive[holder] then
      sums[kind] = (sums[kind] or 0) + tonumber(all[index + 1])
    else
      dead[#dead + 1] = all[index]
    end
  end
  if #dead > 0 then redis.call('HDEL', key, unpack(dead)) end
  sums.n = sums[money] or 0
  return sums
end

local function reserve(state, kind, amount)
  if amount == 0 or not state.limits.needs_reserved then return end
  local key, field = state.scope .. ':held', given.holder .. ' ' .. kind
  if amount < 0 and redis.call('HEXISTS', key, field) == 0 then return end -- removed: this process seemed dead
  if redis.call('HINCRBY', key, field, string.format('%.0f', amount)) <= 0 then redis.call('HDEL', key, field) end
  redis.call('EXPIRE', key, DAY_S)
end

local function reserve_amounts(state, sign, tokens, nanos)
  reserve(state, 'a', sign * given.audio_ms)
  reserve(state, 't', sign * tokens)
  reserve(state, money, sign * nanos)
end

-- Tokens and nanos billed in the request's period; nil if unknown.
local function billed(scope)
  local of_day = redis.call('HMGET', scope .. day_key, 't', money)
  local of_month = redis.call('HMGET', scope .. month_key, 't', money)
  if not (of_day[1] and of_day[2] and of_month[1] and of_month[2]) then return nil end
  return {
    tokens_per_day = tonumber(of_day[1]), nanos_per_day = tonumber(of_day[2]),
    tokens_per_month = tonumber(of_month[1]), nanos_per_month = tonumber(of_month[2]),
  }
end

-- The quotient of two whole numbers, rounded down.
local function quotient(dividend, divisor) return (dividend - math.fmod(dividend, divisor)) / divisor end

-- The functions of spending.py, where each is explained.
local function left_by_tokens(limit, sum, held_tokens) return limit - sum - held_tokens - given.input_tokens end

local function left_by_money(limit, sum, held_tokens, held_nanos, free_left)
  if sum > limit then return -1 end
  local free_output = free_left - held_tokens - given.input_tokens
  if free_output >= given.max_output_tokens then return free_output end
  local nanos = limit - sum - held_nanos - given.input_nanos + given.min_token_nanos * free_left
  if nanos < 0 then return math.max(-1, free_output) end
  if given.output_token_nanos == 0 then return NO_BUDGET end
  return math.max(free_output, quotient(nanos, given.output_token_nanos))
end

local function share_of(left, running)
  if running <= 1 then return left end
  return math.max(math.min(left, MIN_SHARE_TOKENS), (left - left % SHARE) / SHARE)
end

-- The tenant's free quota: what settled requests have left of it, and what running ones can use.
local function quota_of()
  for _, state in ipairs(states) do
    if state.limits.free_tokens then
      local left = math.max(0, state.limits.free_tokens - (state.free_used or 0))
      return {left = left, only = state.limits.only_free, held_tokens = state.reserved.t}
    end
  end
end

-- The reason to refuse a request to which spending leaves no output token, if there is one; sets state.output_left.
local function spending_refusal(state, quota)
  local limits, sums, held = state.limits, state.billed, state.reserved
  local needed = math.min(1, given.max_output_tokens)
  state.output_left = NO_BUDGET
  local function leaves(output_tokens)
    state.output_left = math.min(state.output_left, output_tokens)
    return output_tokens >= needed
  end
  local function retry_s(unreserved) return unreserved >= needed and RESERVED_RETRY_S or 0 end
  if limits.has_budget then
    if not sums then return Reason.UNSEEDED, 0 end
    for _, budget in ipairs(TOKEN_BUDGETS) do
      local name, reason, limit = budget[1], budget[2], limits[budget[1]]
      if limit and not leaves(left_by_tokens(limit, sums[name], held.t)) then
        return reason, retry_s(left_by_tokens(limit, sums[name], 0))
      end
    end
    -- A key has no free tokens for certain: the tenant's other keys may use them first.
    local free_left = quota and limits.free_tokens and quota.left or 0
    for _, budget in ipairs(MONEY_BUDGETS) do
      local name, reason, limit = budget[1], budget[2], limits[budget[1]]
      local pays = limit and not (quota and quota.only)
      if pays and not leaves(left_by_money(limit, sums[name], held.t, held.n, free_left)) then
        return reason, retry_s(left_by_money(limit, sums[name], 0, 0, free_left))
      end
    end
  end
  if limits.free_tokens then
    if not state.free_used then return Reason.UNSEEDED, 0 end
    local alone = quota.left > 0 and quota.held_tokens == 0
    if limits.only_free and not alone and not leaves(quota.left - quota.held_tokens - given.input_tokens) then
      return Reason.FREE_TIER, 0
    end
  end
end

-- The price of the tokens that are not free, in whole nanos, rounded up.
local function nanos_to_pay(free_tokens)
  if free_tokens == 0 then return given.nanos end
  local product = given.nanos * (given.tokens - free_tokens)
  return quotient(product, given.tokens) + (math.fmod(product, given.tokens) > 0 and 1 or 0)
end

-- Count what was billed, where it is known what was billed before.
local function bill(state, nanos, free_tokens)
  local scope = state.scope
  for _, key in ipairs({scope .. day_key, scope .. month_key}) do
    for field, amount in pairs({t = given.tokens, [money] = nanos}) do
      if redis.call('HEXISTS', key, field) == 1 then
        redis.call('HINCRBY', key, field, string.format('%.0f', amount))
      end
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
  local nanos, more = nanos_to_pay(free_tokens), given.tokens - given.expected_tokens
  for _, state in ipairs(states) do
    local key, limit = state.scope .. ':t', state.limits.tokens_per_minute
    reserve(state, 'r', -1)
    reserve_amounts(state, -1, given.max_tokens, given.max_nanos)
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
    reserve_amounts(state, 1, given.max_tokens, given.max_nanos)
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
  state.billed = limits.has_budget and billed(scope)
  state.free_used = limits.free_tokens and tonumber(redis.call('GET', scope .. ':free') or nil)
end
local quota = quota_of()

local function answer(values)
  values.now_s = now_s
  local fields = reply(values)
  for _, state in ipairs(states) do
    local use = {
      requests = state.requests.sum, tokens = state.tokens.sum, audio_ms = state.audio.sum,
      running = state.reserved.r, running_audio_ms = state.reserved.a, free_tokens = state.free_used or 0,
    }
    for _, name in ipairs(USE) do
      fields[#fields + 1] = use[name] or state.billed and state.billed[name] or 0
    end
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
    local reason, seconds = spending_refusal(state, quota)
    if reason then return refuse(reason, seconds) end
  end
  for _, state in ipairs(states) do
    count(state.scope .. ':r', state.limits.requests_per_minute, now_s, 1)
    reserve(state, 'r', 1)
    state.requests.sum, state.reserved.r = state.requests.sum + 1, state.reserved.r + 1
  end
  return answer({})
end

-- charge
local output_tokens, expected_tokens = given.max_output_tokens, given.input_tokens + given.expected_output_tokens
for _, state in ipairs(states) do
  local limits, tokens, audio = state.limits, state.tokens, state.audio
  if limits.tokens_per_minute and tokens.sum + expected_tokens > limits.tokens_per_minute then
    return refuse(Reason.TOKENS_PER_MINUTE, retry_after_s(tokens, expected_tokens, limits.tokens_per_minute))
  end
  if limits.audio_ms_per_minute and audio.sum + given.audio_ms > limits.audio_ms_per_minute then
    return refuse(Reason.AUDIO_SECONDS_PER_MINUTE, retry_after_s(audio, given.audio_ms, limits.audio_ms_per_minute))
  end
  if limits.concurrent_audio_ms and state.reserved.a + given.audio_ms > limits.concurrent_audio_ms then
    return refuse(Reason.CONCURRENT_AUDIO_SECONDS, 1)
  end
  local reason, seconds = spending_refusal(state, quota)
  if reason then return refuse(reason, seconds) end
  output_tokens = math.min(output_tokens, share_of(state.output_left, state.reserved.r))
end
local max_tokens = given.input_tokens + output_tokens
local max_nanos = given.input_nanos + output_tokens * given.output_token_nanos
for _, state in ipairs(states) do
  count(state.scope .. ':t', state.limits.tokens_per_minute, now_s, expected_tokens)
  count(state.scope .. ':a', state.limits.audio_ms_per_minute, now_s, given.audio_ms)
  reserve_amounts(state, 1, max_tokens, max_nanos)
  state.tokens.sum = state.tokens.sum + expected_tokens
  state.audio.sum, state.reserved.a = state.audio.sum + given.audio_ms, state.reserved.a + given.audio_ms
end
return answer({free_left = quota and quota.left or 0, output_tokens = output_tokens})
