// Loads the codes and values of one attention layer and compares every bit of context = KᵀV (KEYS = 1) or of Q·context (KEYS = 0).
`timescale 1ns / 1ns

module mat_add_tb #(
    parameter IMAGES = 1, TOKENS = 1, HEADS = 1, WIDTH = 1, KEYS = 1, VALUE_BITS = 8, ACC_BITS = 16, PLUS_MINUS = 0
);
    localparam CHANNELS = HEADS * WIDTH;
    localparam OUTER = KEYS ? WIDTH : TOKENS;  // rows of one head's result
    localparam SUMMED = KEYS ? TOKENS : WIDTH;
    localparam VALUES = IMAGES * CHANNELS * (KEYS ? TOKENS : WIDTH);

    reg signed [1:0] code_mem[0:IMAGES*TOKENS*CHANNELS-1];
    reg signed [VALUE_BITS-1:0] value_mem[0:VALUES-1];
    reg signed [ACC_BITS-1:0] y_mem[0:IMAGES*HEADS*OUTER*WIDTH-1];

    reg clk = 0, clear = 0, code = 0;
    reg signed [VALUE_BITS-1:0] value = 0;
    wire signed [ACC_BITS-1:0] acc;
    integer image, head, row, column, step, place, wrong;
    reg [8*1024-1:0] file;

    mat_add #(.VALUE_BITS(VALUE_BITS), .ACC_BITS(ACC_BITS), .PLUS_MINUS(PLUS_MINUS)) sums (clk, clear, code, value, acc);

    task tick;
        begin
            #1 clk = 1;
            #1 clk = 0;
        end
    endtask

    // Tokens are (image, token, head, width), a context is (image, head, code, width).
    function integer token_place(input integer i, input integer t, input integer h, input integer d);
        token_place = (i * TOKENS + t) * CHANNELS + h * WIDTH + d;
    endfunction

    function integer context_place(input integer i, input integer h, input integer r, input integer d);
        context_place = ((i * HEADS + h) * WIDTH + r) * WIDTH + d;
    endfunction

    initial begin
        if ($value$plusargs("codes=%s", file)) $readmemh(file, code_mem);
        if ($value$plusargs("values=%s", file)) $readmemh(file, value_mem);
        if ($value$plusargs("y=%s", file)) $readmemh(file, y_mem);
        wrong = 0;
        for (image = 0; image < IMAGES; image = image + 1)
            for (head = 0; head < HEADS; head = head + 1)
                for (row = 0; row < OUTER; row = row + 1)
                    for (column = 0; column < WIDTH; column = column + 1) begin
                        clear = 1;
                        tick;
                        clear = 0;
                        for (step = 0; step < SUMMED; step = step + 1) begin
                            code = KEYS ? code_mem[token_place(image, step, head, row)][0] : code_mem[token_place(image, row, head, step)][0];
                            value = KEYS ? value_mem[token_place(image, step, head, column)] : value_mem[context_place(image, head, step, column)];
                            tick;
                        end
                        place = KEYS ? context_place(image, head, row, column) : token_place(image, row, head, column);
                        if (acc !== y_mem[place]) wrong = wrong + 1;
                    end
        if (wrong == 0) $display("PASS: %0d outputs, every bit", IMAGES * HEADS * OUTER * WIDTH);
        else $display("FAIL: %0d of %0d outputs differ", wrong, IMAGES * HEADS * OUTER * WIDTH);
        $finish;
    end
endmodule
