// Exact amounts: prices per 1,000 tokens have six decimals at most, so a token costs whole nano-units.

const DECIMALS = 9;

function scaled(text, decimals) {
  const [whole, fraction = ""] = text.split(".");
  return BigInt(whole + fraction.padEnd(decimals, "0").slice(0, decimals));
}

// The list price of a caption's tokens, as a decimal text.
export function listPrice(price, inputTokens, outputTokens) {
  const nanos = BigInt(inputTokens) * scaled(price.input, 6) + BigInt(outputTokens) * scaled(price.output, 6);
  return decimal(nanos);
}

export function sum(amounts) {
  return decimal(amounts.reduce((total, amount) => total + scaled(amount, DECIMALS), 0n));
}

function decimal(nanos) {
  const digits = nanos.toString().padStart(DECIMALS + 1, "0");
  const fraction = digits.slice(-DECIMALS).replace(/0+$/, "").padEnd(2, "0");
  return `${digits.slice(0, -DECIMALS)}.${fraction}`;
}
