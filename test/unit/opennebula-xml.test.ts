import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { KvmIbError } from '../../lib/core/errors.ts';
import { childrenNamed, escapeXml, parseXml, type XmlElement } from '../../lib/core/xml.ts';

const read = (text: string, limits: { maxLength?: number; maxDepth?: number } = {}): XmlElement =>
  parseXml(text, { roots: ['a'], what: 'the sample', ...limits });

function refusal(text: string, limits: { maxLength?: number; maxDepth?: number } = {}): KvmIbError {
  try {
    read(text, limits);
  } catch (error) {
    expect(error).toBeInstanceOf(KvmIbError);
    const known = error as KvmIbError;
    expect(known.code).toBe('bad-input');
    expect(known.message).toBe('Cannot read the sample');
    expect(known.why).toBeTruthy();
    expect(known.fix).toBeTruthy();
    return known;
  }
  throw new Error(`accepted: ${text.slice(0, 100)}`);
}

describe('parseXml reads', () => {
  test('text, CDATA, attributes in either quotes, comments and prefixes', () => {
    const root = read(
      `\ufeff<?xml version="1.0"?>\n<!-- <a> -->\n<a x='1>2' y="it's">p<![CDATA[<&amp;>]]>q<n:b/></a>\n`,
    );
    expect(root.attributes).toEqual(
      new Map([
        ['x', '1>2'],
        ['y', "it's"],
      ]),
    );
    expect(root.text).toBe('p<&amp;>q');
    expect(root.children.map((child) => child.name)).toEqual(['n:b']);
  });

  test('the five entities and character references once, and leaves any other & as it stands', () => {
    const root = read(`<a t='&lt;&#65;&quot;'>R&D &amp;lt; &#x41;&#x1F600; &nbsp; &#0; &#x110000; &</a>`);
    expect(root.attributes.get('t')).toBe('<A"');
    expect(root.text).toBe('R&D &lt; A\u{1f600} &nbsp; &#0; &#x110000; &');
  });

  test('every value as a string: no numbers, no booleans, no trimming', () => {
    const root = read(`<a v='007'><b>1e3</b><b>true</b><b> 0x10 </b><b/><b></b></a>`);
    expect(root.attributes.get('v')).toBe('007');
    expect(childrenNamed(root, 'b').map((b) => b.text)).toEqual(['1e3', 'true', ' 0x10 ', '', '']);
  });

  test('processing instructions anywhere, even with a lone quote or a tag inside', () => {
    const root = read(`<?x it's?><a>1<?y " <b> ?>2<?z?></a><?x "?>`);
    expect(root.text).toBe('12');
    expect(root.children).toEqual([]);
  });

  test('positions that stand after CRLF, comments and characters of several bytes', () => {
    const text = `\r\n<!-- é -->\r\n<a>\r\n\r\n<b\tx='1'\r\n/>é<c>\r\n</c ></a>\r\n`;
    const root = read(text);
    expect(root.children.map((child) => text.slice(child.start, child.end))).toEqual([
      `<b\tx='1'\r\n/>`,
      `<c>\r\n</c >`,
    ]);
    expect(text.slice(root.start, root.end)).toBe(text.trim().slice(text.trim().indexOf('<a>')));
  });

  test('names that JavaScript objects have of their own, without touching any object', () => {
    const root = read(`<a toString='1' constructor='2' __proto__='3'><hasOwnProperty>x</hasOwnProperty><valueOf/></a>`);
    expect([...root.attributes]).toEqual([
      ['toString', '1'],
      ['constructor', '2'],
      ['__proto__', '3'],
    ]);
    expect(root.children.map((child) => child.name)).toEqual(['hasOwnProperty', 'valueOf']);
    expect(({} as Record<string, unknown>)['3']).toBeUndefined();
  });

  test('nesting up to the limit and not beyond', () => {
    const nested = (depth: number) => `${'<a>'.repeat(depth)}${'</a>'.repeat(depth)}`;
    expect(read(nested(256)).name).toBe('a');
    expect(refusal(nested(257)).why).toContain('nested deeper than 256');
    expect(refusal(nested(4), { maxDepth: 3 }).why).toContain('nested deeper than 3');
  });
});

describe('parseXml refuses', () => {
  test.each([
    ['nothing', '', 'it is empty'],
    ['blanks only', ' \n ', 'there is no element in it'],
    ['plain text', 'EOT', 'text before the root element'],
    ['a wrong root', '<b/>', 'its root element is <b>, not <a>'],
    ['two roots', '<a/>\n<a/>', 'second root element (line 2, column 1)'],
    ['text behind the root', '<a/>x', 'text behind the root element'],
    ['an element that is not closed', '<a>\n <b>', '<b> is not closed'],
    ['crossed tags', '<a><b></a></b>', '</a> closes <b> (line 1, column 7)'],
    ['a closing tag too many', '<a/></a>', '</a> closes nothing'],
    ['a closing tag with attributes', "<a></a b=''>", 'closing tag is malformed'],
    ['a tag cut off', '<a', 'cut off'],
    ['an attribute cut off', "<a b='1", 'value of the attribute b is not closed'],
    ['a closing tag cut off', '<a></a', 'cut off'],
    ['an attribute without a value', '<a b/>', 'attribute b has no quoted value'],
    ['an attribute without quotes', '<a b=1/>', 'attribute b has no quoted value'],
    ['attributes without a space between', "<a b='1'c='2'/>", 'tag is malformed'],
    ['an attribute twice', "<a b='1' b='2'/>", 'attribute b is given twice'],
    ['a < in a value', "<a b='<'/>", 'has a "<"'],
    ['a raw < in text', '<a>1 < 2</a>', 'tag has no name'],
    ['names outside ASCII', '<a><\u00e9/></a>', 'tag has no name'],
    ['an open comment', '<a><!-- </a>', 'comment is not closed'],
    ['an open CDATA section', '<a><![CDATA[ </a>', 'CDATA section is not closed'],
    ['an open instruction', '<a><?x </a>', 'processing instruction is not closed'],
    ['CDATA outside the root', '<![CDATA[x]]><a/>', 'outside the root'],
    ['a document type', '<!DOCTYPE a><a/>', 'declares a document type or entities'],
    ['a document type inside', '<a><!doctype a></a>', 'declares a document type or entities'],
    ['an entity declaration', '<a><!ENTITY x "y"></a>', 'declares a document type or entities'],
    ['UTF-16', '\ufffe<\0a\0/\0>\0', 'NUL character'],
    ['a tag named __proto__', '<a><__proto__><x/></__proto__></a>', '__proto__'],
    ['a tag named constructor', '<a><constructor/></a>', 'constructor'],
  ])('%s', (_, text, why) => {
    expect(refusal(text).why).toContain(why);
  });

  test('an entity bomb, before anything is expanded', () => {
    const levels = Array.from({ length: 9 }, (_, n) => `<!ENTITY l${n + 1} "${`&l${n};`.repeat(10)}">`).join('');
    expect(refusal(`<!DOCTYPE a [<!ENTITY l0 "lol">${levels}]><a>&l9;</a>`).why).toContain('document type');
  });

  test('a document cut off at any place', () => {
    const whole = `<?xml version='1.0'?><a b='1'><!-- c --><d>x</d><![CDATA[y]]><e f="2"/></a>`;
    for (let length = 0; length < whole.length; length += 1) refusal(whole.slice(0, length));
    expect(read(whole).children).toHaveLength(2);
  });

  test('control characters of the input never reach the message raw', () => {
    const why = refusal(`<a><b\u001b[2J></b></a>`).why ?? '';
    expect(why).not.toMatch(/[\u0000-\u001f]/);
    expect(refusal('<\n').why).not.toContain('\n');
  });
});

describe('parseXml ends soon, whatever it is given:', () => {
  const size = 10 * 1024 * 1024;
  test.each([
    ['open tags', () => '<a>'.repeat(size / 3)],
    ['closing tags', () => `<a>${'</a>'.repeat(size / 4)}`],
    ['one attribute again and again', () => `<a ${"b='' ".repeat(size / 5)}/>`],
    ['attributes of many names', () => `<a ${Array.from({ length: 600_000 }, (_, n) => `b${n}='' `).join('')}/>`],
    ['one long attribute', () => `<a b='${'x'.repeat(size)}'/>`],
    ['ampersands', () => `<a>${'&'.repeat(size)}</a>`],
    ['as many ampersands as are let in', () => `<a>${'&#38;'.repeat(400_000)}</a>`],
    ['as much text as is let in', () => `<a>${'\r\n'.repeat(1_000_000)}</a>`],
    ['as many elements as are let in', () => `<a>${"<b c='d'/>".repeat(99_999)}</a>`],
    ['more elements than are let in', () => `<a>${'<b/>'.repeat(100_001)}</a>`],
    ['an open CDATA section', () => `<a><![CDATA[${'x'.repeat(size)}`],
    ['open CDATA sections', () => `<a>${'<![CDATA['.repeat(size / 9)}`],
    ['empty CDATA sections', () => `<a>${'<![CDATA[]]>'.repeat(size / 12)}</a>`],
    ['a long CDATA section', () => `<a><![CDATA[${'x'.repeat(size)}]]></a>`],
    ['comments', () => `<a>${'<!---->'.repeat(size / 7)}</a>`],
    ['instructions', () => `<a>${'<?b?>'.repeat(size / 5)}</a>`],
    ['quotes', () => `<a ${'"'.repeat(size)}`],
    ['less-than signs', () => '<'.repeat(size)],
    ['blanks', () => ' '.repeat(size)],
    ['a long name', () => `<${'a'.repeat(size)}`],
    ['too much of anything', () => `<a>${'x'.repeat(17 * 1024 * 1024)}</a>`],
  ])('%s', (_, make) => {
    const text = make();
    const start = performance.now();
    try {
      expect(read(text).name).toBe('a');
    } catch (error) {
      expect(error).toBeInstanceOf(KvmIbError);
    }
    expect(performance.now() - start).toBeLessThan(2000);
  });
});

describe('parseXml and a writer agree', () => {
  interface Plain {
    readonly name: string;
    readonly attributes: readonly (readonly [string, string])[];
    readonly text: string;
    readonly children: readonly Plain[];
  }
  const characters = fc.string({ unit: fc.constantFrom(...'ab<>&"\'] \n\u00e9\u001b#;!-?[') });
  const name = fc.constantFrom('a', 'b', 'toString', 'n:x', '_y', 'z-1.2');
  const node = (children: fc.Arbitrary<Plain[]>): fc.Arbitrary<Plain> =>
    fc.record({
      name,
      attributes: fc.uniqueArray(fc.tuple(name, characters), { selector: ([key]) => key, maxLength: 3 }),
      text: characters,
      children,
    });
  const leaf = node(fc.constant([]));
  const branch = node(fc.array(leaf, { maxLength: 3 }));
  const tree = node(fc.array(fc.oneof(leaf, branch), { maxLength: 3 }));

  const write = (node: Plain, cdata: boolean): string => {
    const attributes = node.attributes.map(([key, value]) => ` ${key}='${escapeXml(value)}'`).join('');
    const text = cdata ? `<![CDATA[${node.text.replaceAll(']]>', ']]]]><![CDATA[>')}]]>` : escapeXml(node.text);
    return `<${node.name}${attributes}>${text}${node.children.map((child) => write(child, !cdata)).join('')}</${node.name}>`;
  };
  const plain = (element: XmlElement): Plain => ({
    name: element.name,
    attributes: [...element.attributes],
    text: element.text,
    children: element.children.map(plain),
  });

  test('on any tree, text and attributes', () => {
    fc.assert(
      fc.property(tree, fc.boolean(), (node, cdata) => {
        const text = write({ ...node, name: 'a' }, cdata);
        expect(plain(read(text))).toEqual({ ...node, name: 'a' });
      }),
    );
  });

  test('on any soup of markup: it is read, or refused with a reason', () => {
    const pieces = [
      '<a>',
      '</a>',
      '<b/>',
      '<b ',
      "x='1'",
      '>',
      '<!--',
      '-->',
      '<![CDATA[',
      ']]>',
      '<?',
      '?>',
      '&lt;',
      '\0',
      '"',
    ];
    fc.assert(
      fc.property(fc.array(fc.constantFrom(...pieces, ' ', 'é', '<'), { maxLength: 12 }), (soup) => {
        try {
          expect(read(`<a>${soup.join('')}</a>`).name).toBe('a');
        } catch (error) {
          expect(error).toBeInstanceOf(KvmIbError);
          expect((error as KvmIbError).why).not.toContain('two readers');
        }
      }),
      { numRuns: 3000 },
    );
  });
});
