/**
 * nftables through libnftables-json(5): typed commands, transactions as values, classed errors, typed listings, and a
 * fake that behaves. Knows nothing of who uses it. See README.md.
 */
export { NftError, type NftErrorCode, type NftErrorDetails } from './errors.ts';
export { createFakeNft } from './fake.ts';
export { parseListing } from './listing.ts';
export { createNft, type Nft, type NftExec, type NftOptions } from './run.ts';
export {
  append,
  isPair,
  print,
  printCommand,
  printExpression,
  printStatement,
  type Transaction,
  toJson,
  transaction,
} from './transaction.ts';
export type * from './types.ts';
